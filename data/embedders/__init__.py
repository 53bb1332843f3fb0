"""Embedders: documents to vectors, one file each; ``order.embedder`` names one.

Each has ``settings(order)``: what decides the vectors besides the documents, and ``embed(stage, shared, parts,
run_units)``, which writes ``vectors-*.npy`` (``data.vectors``) and returns their dimensions and the units' results.
``shared`` holds the settings, the folder of the curated documents, and the model's folder where there is one.
"""

from data.embedders import static, tfidf, transformer

EMBEDDERS = {"tfidf": tfidf, "static": static, "transformer": transformer}
