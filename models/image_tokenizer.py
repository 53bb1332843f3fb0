"""Images to tokens and back: a small vector-quantised autoencoder (van den Oord et al. 2017, arXiv 1711.00937).

The codebook is moved by exponential means of the vectors that chose each code (appendix A.1 there); a code that hardly
any vector chooses is moved to where vectors are (Dhariwal et al. 2020, arXiv 2005.00341, section 3.1).
"""

import json
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from conf.errors import DataError
from data.files import fsync_folder, make_folder, write_atomic, writing
from data.images import CONFIG, WEIGHTS, ImageSpec, read_image_spec

BATCH = 256  # images that are encoded or decoded together
Pixels = npt.NDArray[np.uint8]  # [images, size, size, channels]
Codes = npt.NDArray[np.int64]  # [images, tokens]


class ImageTokenizer(Protocol):
    """What turns images into codes and back; ``data.images.ImageSpec.kind`` names the class."""

    spec: ImageSpec

    def encode(self, pixels: Pixels) -> Codes:
        """Codes of images, row by row of their patches."""
        ...

    def decode(self, codes: Codes) -> Pixels:
        """The images that codes stand for."""
        ...


class Residual(nn.Module):
    """``x + conv1x1(silu(conv3x3(silu(x))))``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spread = nn.Conv2d(width, width, 3, padding=1)
        self.mix = nn.Conv2d(width, width, 1)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return x_NCHW + self.mix(F.silu(self.spread(F.silu(x_NCHW))))


class Codebook(nn.Module):
    """Vectors to the nearest of ``codes`` vectors, which follow the means of what chose them."""

    def __init__(self, codes: int, dim: int) -> None:
        super().__init__()
        self.vectors: Tensor
        self.counts: Tensor
        self.sums: Tensor
        self.register_buffer("vectors", torch.zeros(codes, dim))
        self.register_buffer("counts", torch.zeros(codes))  # moving mean of the vectors that choose each code
        self.register_buffer("sums", torch.zeros(codes, dim))  # and of their sum
        self.chosen: tuple[Tensor, Tensor] | None = None  # vectors of the last training pass and their codes

    def nearest(self, z_ND: Tensor) -> Tensor:
        """The code of each vector, int64 [vectors]; of equally near ones the first."""
        distance_NK = self.vectors.square().sum(1) - 2 * z_ND @ self.vectors.T
        return distance_NK.argmin(1)

    def forward(self, z_ND: Tensor) -> Tensor:
        """The vectors' codes as vectors of the codebook, [vectors, dim]."""
        ids_N = self.nearest(z_ND)
        if self.training:
            self.chosen = z_ND.detach(), ids_N
        return self.vectors[ids_N]

    @torch.no_grad()
    def move(self, decay: float, restart_below: float, generator: torch.Generator) -> float:
        """Follow what all ranks chose in the last training pass; return the share of codes in use. Collective.

        A code whose mean use is under ``restart_below`` times the even share becomes a vector of the pass, drawn by
        ``generator`` from those of all ranks, which hold equally many, and starts with the even share.
        """
        assert self.chosen is not None, "the codebook moves after a training pass"
        z_ND, ids_N = self.chosen
        codes = len(self.vectors)
        seen = torch.zeros(codes, z_ND.shape[1] + 1, device=z_ND.device)
        seen.index_add_(0, ids_N, torch.cat([z_ND.float(), z_ND.new_ones(len(z_ND), 1, dtype=torch.float32)], 1))
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        drawn = torch.randint(ranks * len(z_ND), (codes,), generator=generator).to(z_ND.device) - rank * len(z_ND)
        mine = (drawn >= 0) & (drawn < len(z_ND))
        fresh = torch.where(mine[:, None], z_ND.float()[drawn.where(mine, 0)], 0.0)
        if ranks > 1:
            dist.all_reduce(seen)
            dist.all_reduce(fresh)
        self.counts.lerp_(seen[:, -1], 1 - decay)
        self.sums.lerp_(seen[:, :-1], 1 - decay)
        even = seen[:, -1].sum() / codes
        dead = self.counts < restart_below * even
        self.counts.copy_(torch.where(dead, even, self.counts))
        self.sums.copy_(torch.where(dead[:, None], fresh * even, self.sums))
        self.vectors.copy_(self.sums / self.counts[:, None])
        self.chosen = None
        return 1 - dead.float().mean().item()


class VectorQuantised(nn.Module):
    """Convolutions down to one vector a patch, the codebook, and convolutions back up."""

    def __init__(self, spec: ImageSpec) -> None:
        super().__init__()
        self.spec = spec
        width, halvings = spec.width, spec.patch.bit_length() - 1
        down: list[nn.Module] = [nn.Conv2d(spec.channels, width, 3, padding=1)]
        up: list[nn.Module] = [nn.Conv2d(spec.code_dim, width, 3, padding=1), Residual(width)]
        for _ in range(halvings):
            down += [nn.SiLU(), nn.Conv2d(width, width, 4, stride=2, padding=1)]
            up += [nn.SiLU(), nn.ConvTranspose2d(width, width, 4, stride=2, padding=1)]
        self.down = nn.Sequential(*down, Residual(width), nn.SiLU(), nn.Conv2d(width, spec.code_dim, 1))
        self.codebook = Codebook(spec.codes, spec.code_dim)
        self.up = nn.Sequential(*up, nn.SiLU(), nn.Conv2d(width, spec.channels, 3, padding=1))

    def forward(self, images_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """(mean squared error of the pixels, mean squared distance of the encoder from its codes), scalars.

        Pixels are from 0 to 1. The decoder's gradient reaches the encoder as if quantising were the identity
        (section 3.2, straight-through).
        """
        z_ND = self._vectors(images_NCHW)
        q_ND = self.codebook(z_ND)
        restored = self._images(z_ND + (q_ND - z_ND).detach(), len(images_NCHW))
        return F.mse_loss(restored, images_NCHW), F.mse_loss(z_ND, q_ND.detach())

    def _vectors(self, images_NCHW: Tensor) -> Tensor:
        """One vector a patch, row by row: [images * tokens, code_dim]."""
        return self.down(images_NCHW - 0.5).permute(0, 2, 3, 1).reshape(-1, self.spec.code_dim)

    def _images(self, vectors_ND: Tensor, images: int) -> Tensor:
        side = self.spec.size // self.spec.patch
        grid = vectors_ND.view(images, side, side, self.spec.code_dim).permute(0, 3, 1, 2)
        return self.up(grid) + 0.5

    @torch.no_grad()
    def encode(self, pixels: Pixels) -> Codes:
        """[images, size, size, channels] to codes [images, tokens]."""
        device, codes = self.codebook.vectors.device, np.empty((len(pixels), self.spec.tokens), dtype=np.int64)
        for start in range(0, len(pixels), BATCH):
            images = to_tensor(pixels[start : start + BATCH]).to(device)
            found = self.codebook.nearest(self._vectors(images))
            codes[start : start + BATCH] = found.view(len(images), -1).cpu().numpy()
        return codes

    @torch.no_grad()
    def decode(self, codes: Codes) -> Pixels:
        """[images, tokens] to [images, size, size, channels]. Raises DataError for codes that the codebook lacks."""
        if codes.size and not 0 <= codes.min() <= codes.max() < self.spec.codes:
            rule = f"codes of images are from 0 to {self.spec.codes - 1}"
            raise DataError("codes", f"{codes.min()} to {codes.max()}", rule, "use the tokenizer that made them")
        shape = (len(codes), self.spec.size, self.spec.size, self.spec.channels)
        found = np.empty(shape, dtype=np.uint8)
        for start in range(0, len(codes), BATCH):
            part = torch.from_numpy(codes[start : start + BATCH]).to(self.codebook.vectors.device)
            images = self._images(self.codebook.vectors[part.flatten()], len(part)).clamp(0, 1)
            found[start : start + BATCH] = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return found

    @torch.no_grad()
    def initialise(self, seed: int) -> "VectorQuantised":
        """Fill the weights from ``seed`` alone, normal by fan-in (He et al. 2015), biases 0; returns the model."""
        generator = torch.Generator("cpu").manual_seed(seed)
        for parameter in self.parameters():
            if parameter.ndim == 1:
                parameter.zero_()
            else:
                fan_in = parameter[0].numel()
                parameter.normal_(0.0, (1.0 / fan_in) ** 0.5, generator=generator)
        return self


def to_tensor(pixels: Pixels) -> Tensor:
    """Pixels [images, size, size, channels] as fp32 [images, channels, size, size] from 0 to 1."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


KINDS: dict[str, type[VectorQuantised]] = {"vq": VectorQuantised}


def save_image_tokenizer(model: VectorQuantised, folder: str | Path, notes: Mapping[str, str] | None = None) -> Path:
    """Write ``config.json`` and ``model.safetensors`` (and further text files); the config comes last.

    Raises:
        DataError: the folder cannot be written.
        ResourceError: the disk is full.
    """
    target = make_folder(Path(folder).expanduser())
    (target / CONFIG).unlink(missing_ok=True)  # until it is back, there is no image tokenizer here
    tensors = {name: value.detach().to("cpu", torch.float32).contiguous() for name, value in model.state_dict().items()}
    beside = target / f".{uuid.uuid4().hex[:12]}.tmp"
    with writing(target):
        save_file(tensors, beside, metadata={"format": "pt"})
        with open(beside, "rb+") as written:
            written.flush()
        beside.rename(target / WEIGHTS)
    for name, text in (notes or {}).items():
        write_atomic(target / name, text)
    write_atomic(target / CONFIG, json.dumps(asdict(model.spec), indent=1) + "\n")
    fsync_folder(target)
    return target


def load_image_tokenizer(folder: str | Path) -> ImageTokenizer:
    """The image tokenizer of a folder, on the CPU.

    Raises:
        DataError: there is none, it is damaged, or of a kind that is not known.
    """
    folder = Path(folder).expanduser()
    spec = read_image_spec(folder)
    if spec.kind not in KINDS:
        rule = f"one of {', '.join(KINDS)}"
        raise DataError(str(folder / CONFIG), spec.kind, rule, "sundog train trainer=image_tokenizer")
    model = KINDS[spec.kind](spec).eval()
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (SafetensorError, OSError, RuntimeError) as error:
        rule = f"the weights that {CONFIG} describes"
        fix = "sundog train trainer=image_tokenizer"
        raise DataError(str(folder / WEIGHTS), " ".join(str(error).split())[:200], rule, fix) from error
    return model
