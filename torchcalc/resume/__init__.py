"""What lets a training go on exactly where it stopped: loaders that know their position, random states, whole checkpoints.

With Lightning one callback does it all: ``torchcalc.instruments.ExactResume``. In a loop of your own:

>>> import tempfile, torch
>>> from pathlib import Path
>>> path = Path(tempfile.mkdtemp()) / "last.ckpt"
>>> loader, net = Loader(range(8), 4), torch.nn.Linear(1, 1)
>>> for batch in loader:
...     save({"net": net.state_dict(), "loader": loader.state_dict(), "rng": rng_state()}, path)
>>> checkpoint = torch.load(path)
>>> net.load_state_dict(checkpoint["net"])
<All keys matched successfully>
>>> loader.load_state_dict(checkpoint["loader"])
>>> set_rng_state(checkpoint["rng"])
"""

from torchcalc.resume.files import is_complete, newest, save
from torchcalc.resume.loader import Loader, Replay
from torchcalc.resume.randomness import rng_state, set_rng_state

__all__ = ["Loader", "Replay", "is_complete", "newest", "rng_state", "save", "set_rng_state"]
