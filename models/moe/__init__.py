"""Mixtures of experts in modality groups (MoMa, arXiv:2407.21770): routing, experts, upcycling."""
