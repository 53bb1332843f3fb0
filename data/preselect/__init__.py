"""PreSelect (arXiv 2503.00808): documents whose losses rank models as their abilities do, and a scorer of such text."""
