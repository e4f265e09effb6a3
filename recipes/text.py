"""Text as numbers: English that ships with Python or any file, in pieces learned from it by byte-pair encoding."""

import hashlib
import lzma
import os
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import Dataset

from torchcalc.resume import Loader

BLOCK = 4096  # characters; of twenty blocks the tenth validates and the last one tests
IGNORED = -100


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Words and the words that follow them: windows of ``context``, ``stride`` apart.

    ``new`` counts each target once: what the window before has seen is context only, and its target is ignored.
    """

    def __init__(self, words: Tensor, context: int, stride: int, new: bool = False):
        if len(words) < context + 1:
            raise ValueError(
                f"context={context}: a part of the text has {len(words)} words; give a longer text, or less context"
            )
        self.words, self.context, self.stride, self.new = words, context, stride, new

    def __len__(self) -> int:
        return 1 + -(-(len(self.words) - 1 - self.context) // self.stride)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        start = min(i * self.stride, len(self.words) - 1 - self.context)  # the last one ends with the text
        window = self.words[start : start + self.context + 1]
        target = window[1:]
        if self.new and i:
            seen = (i - 1) * self.stride + self.context - start
            target = torch.cat([torch.full((seen,), IGNORED), target[seen:]])
        return window[:-1], target


class Text(LightningDataModule):
    """The documentation in ``pydoc_data.topics``, or a text file, encoded by the pieces learned from its training part.

    Args:
        file: a text in UTF-8; None: what ships with Python (half a megabyte, another one in every version).
        vocabulary: pieces at most; the bytes are 256 of them.
        context: words that are read at a time.
        batch_size: windows that a training step sees, on all processes together.
    """

    def __init__(
        self,
        file: str | os.PathLike[str] | None = None,
        vocabulary: PositiveInt = 4096,
        context: PositiveInt = 128,
        batch_size: PositiveInt = 16,
    ):
        super().__init__()
        if vocabulary < 256:
            raise ValueError(f"vocabulary={vocabulary}: must be at least 256, the bytes")
        self.batch_size, self.context = batch_size, context
        self.name, text = read(file)
        blocks = [text[i : i + BLOCK] for i in range(0, len(text), BLOCK)]
        if len(blocks) < 20:
            raise ValueError(
                f"file={self.name}: {len(text)} characters are too few; twenty blocks of {BLOCK} are needed"
            )
        held_out = {9: "val", 19: "test"}
        self.parts = {
            part: "".join(block for i, block in enumerate(blocks) if held_out.get(i % 20, "train") == part)
            for part in ("train", "val", "test")
        }
        self.size, self.hash = len(text.encode()), hashlib.sha256(text.encode()).hexdigest()[:16]
        self.encoder = learn(self.parts["train"], vocabulary)
        self.vocabulary = self.encoder.get_vocab_size()
        self.words = {part: torch.tensor(self.encoder.encode(text).ids) for part, text in self.parts.items()}
        stride = max(1, context // 2)
        self.train = Windows(self.words["train"], context, stride)
        self.val, self.test = (Windows(self.words[part], context, stride, new=True) for part in ("val", "test"))

    def words_per_byte(self, part: str) -> float:
        """Targets for each byte that they stand for; the first word of a part is given."""
        return (len(self.words[part]) - 1) / len(self.parts[part].encode())

    def lzma_bits(self, part: str) -> tuple[float, float]:
        """Bits per byte of a part by lzma at its best: alone, and after the training text."""
        known, new = (self.parts[each].encode() for each in ("train", part))
        return packed(new) / len(new), (packed(known + new) - packed(known)) / len(new)

    def train_dataloader(self) -> Loader:
        return Loader(self.train, self.batch_size, seed=torch.initial_seed(), drop_last=True)

    def val_dataloader(self) -> Loader:
        return Loader(self.val, 4 * self.batch_size, shuffle=False)

    def test_dataloader(self) -> Loader:
        return Loader(self.test, 4 * self.batch_size, shuffle=False)


def packed(data: bytes) -> int:
    """Bits that lzma makes of it, without a container's header."""
    return 8 * len(lzma.compress(data, lzma.FORMAT_ALONE, preset=9 | lzma.PRESET_EXTREME))


def read(file: str | os.PathLike[str] | None) -> tuple[str, str]:
    """The text's name and the text."""
    if file is None:
        from pydoc_data.topics import topics

        paragraphs = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
        # Topics share whole sections: what stands there twice counts once, or the held-out part would have been read.
        return "pydoc_data.topics", "\n\n".join(dict.fromkeys(paragraphs))
    try:
        return str(file), Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"file={file}: {error.strerror}; leave it out to learn what ships with Python") from None
    except UnicodeDecodeError:
        raise ValueError(f"file={file}: is no text in UTF-8") from None


def learn(text: str, vocabulary: int) -> Any:
    """An encoder whose pieces are those byte pairs, and pairs of pairs, that the text has most often."""
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise ValueError("the text is encoded by the package tokenizers: pip install 'torchcalc[recipes]'") from None
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork
    encoder = Tokenizer(models.BPE())
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    encoder.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    )
    return encoder
