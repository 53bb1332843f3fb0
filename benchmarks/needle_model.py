"""A model that finds things in its context, written down weight by weight: policies are judged by it without training.

It is an induction circuit (arXiv:2209.11895). The first layer looks one token back and copies what it sees; the
second layer looks for tokens whose copy is the word at hand, and says what stands there. So after ``key`` it
says what followed ``key`` before, over any distance, and a chain of keys is followed to its end. Its attention is what
trained models have too: to the token before, to what matches, and spread over all where nothing matches.
"""

import random
from pathlib import Path
from typing import Any

import torch

from data.tokenize import load_tokenizer, train_tokenizer
from inference.evaluation.needles import FILLER, WORDS
from models.decoder import Decoder, ModelSpec
from models.hf import save_hf
from models.spec import RopeSpec

CONTEXT = 16384
CODE = 32  # features of a word's code; the slow half of the rotation carries it
HEAD = 2 * CODE
DIM = 128  # code, copy of the code before, what is said, and a constant
BACK = 30.0  # sharpness of looking back
MATCH = 200.0  # of looking for the same word


def make_tokenizer(folder: Path) -> Path:
    """Every word of the tasks with the space before it is one token."""
    generator = random.Random(0)
    texts = [" ".join(generator.choice((*WORDS, *FILLER, "?")) for _ in range(400)) for _ in range(60)]
    train_tokenizer([" " + text for text in texts], 3000, folder)
    return folder


@torch.no_grad()
def make_model(vocab: int, seed: int = 0) -> Decoder:
    """The circuit for ``vocab`` words."""
    rope = RopeSpec(theta=1e9)  # its slow pairs do not turn within the context
    spec = ModelSpec(vocab, DIM, 2, 2, 1, HEAD, 64, rope=rope, context=CONTEXT, tie_embeddings=False)
    model = Decoder(spec)
    for name, parameter in model.named_parameters():
        parameter.fill_(1.0 if "norm" in name else 0.0)
    codes = torch.randn(vocab, CODE, generator=torch.Generator().manual_seed(seed))
    codes = torch.nn.functional.normalize(codes, dim=1) * CODE**0.5
    model.embed.weight[:, :CODE] = codes
    model.embed.weight[:, -1] = CODE**0.5  # every word has the same length: norms leave directions alone
    model.head.weight[:, 2 * CODE : 3 * CODE] = codes
    slow = [*range(CODE // 2, CODE), *range(CODE + CODE // 2, 2 * CODE)]  # features of the slow pairs
    layers: list[Any] = list(model.layers)
    back, match = (layer.attention for layer in layers)
    frequency = rope.theta ** (-torch.arange(0, CODE // 2) * 2 / HEAD)  # of the fast pairs
    size = (BACK / (CODE // 2)) ** 0.5
    for pair in range(CODE // 2):  # q k = cos(frequency (i - j - 1)) for every fast pair
        back.k.weight[pair, -1] = size
        for head in range(2):
            back.q.weight[head * HEAD + pair, -1] = size * frequency[pair].cos()
            back.q.weight[head * HEAD + CODE + pair, -1] = -size * frequency[pair].sin()
    for index, feature in enumerate(slow):
        match.k.weight[feature, CODE + index] = 1.0
        for head in range(2):
            match.q.weight[head * HEAD + feature, index] = MATCH / CODE
    for index in range(CODE):
        back.v.weight[index, index] = match.v.weight[index, index] = 1.0
        back.out.weight[CODE + index, index] = 1.0
        match.out.weight[2 * CODE + index, index] = 8.0
    return model


def write(folder: Path) -> Path:
    """The model as a Hugging Face folder."""
    tokenizer_folder = make_tokenizer(folder.parent / f"{folder.name}-tokenizer")
    tokenizer = load_tokenizer(tokenizer_folder)
    assert all(len(tokenizer.encode(" " + word)) == 1 for word in (*WORDS, *FILLER, "?"))
    return save_hf(make_model(tokenizer.vocab_size), folder, tokenizer_folder)
