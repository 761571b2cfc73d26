# SPDX-License-Identifier: Apache-2.0
"""Ways to fit, each once: the sampler and its variants, other papers' objectives, SMC, NUTS, Pyro's guides."""
