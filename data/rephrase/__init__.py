"""Rephrasing (WRAP, arXiv 2401.16380): chunks, styles, requests and their cache, output filters, the mix, a report."""
