"""Fewer layers for later tokens (SkipDecode, arXiv:2307.02628, section 3)."""

from inference.generation import Generation


def active_layers(generation: Generation, layers: int) -> range | list[int]:
    """Which of a model's ``layers`` compute the next token of a text that asks for ``decode_layers``.

    Their number falls linearly from all at the first token to ``decode_layers`` at the last that the text may have; it
    depends on the place alone, so that every layer that a token uses has the keys of all tokens before it. Half of the
    fewest layers are the bottom ones, which all tokens use; the others are counted from the top. Prompts use all.
    """
    least, done = generation.decode_layers, generation.completion_tokens
    if not least or not done or generation.prefilling:
        return range(layers)
    count = layers - round((layers - least) * done / max(1, generation.limit - 1))
    bottom = least // 2
    return [*range(bottom), *range(layers - max(least, count) + bottom, layers)]
