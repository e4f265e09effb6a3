"""What the recipes share: a LightningCLI with a config of its own, one-line errors and a report at the end."""

import logging
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn
from zipfile import is_zipfile

from jsonargparse.typing import restricted_number_type
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    LRSchedulerTypeUnion,
    SaveConfigCallback,
)
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim import Optimizer

from recipes.errors import blame, debugging, did_you_mean, fail, one_line

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**32)])
COMMANDS = LightningCLI.subcommands()


class Parser(LightningArgumentParser):
    """LightningArgumentParser whose errors take one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error or debugging():
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        fail(one_line(message, (action.dest for action in parser._actions)))


class MonitorCheck(Callback):
    """Refuse a ``monitor`` that validation does not log before training, and not after its first epoch.

    Recipes log their metrics as ``name/val`` and ``name/train``; the latter are not known yet and are let through.
    """

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        logged = trainer.callback_metrics
        callbacks = [*trainer.checkpoint_callbacks, *trainer.early_stopping_callbacks]
        watchers: list[tuple[object, str | None]] = [(each, getattr(each, "monitor", None)) for each in callbacks]
        watchers += [(config.scheduler, config.monitor) for config in trainer.lr_scheduler_configs]
        for watcher, monitor in watchers:
            if monitor is not None and monitor not in logged and not monitor.endswith("/train"):
                fail(f"{type(watcher).__name__}: monitor: nothing logs {monitor!r}{did_you_mean(monitor, logged)}")


class SaveFitConfig(SaveConfigCallback):
    """Save the config of the training; that of a later test of its checkpoint would overwrite it."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


class RecipeCLI(LightningCLI):
    """``fit`` trains with ``configs/NAME.yaml``, tests the best checkpoint and says where everything lies.

    Args:
        name: the recipe's name; its config is ``configs/NAME.yaml``, its runs lie in ``runs/NAME``.
        model: the LightningModule's class; if it has a method ``report() -> str``, that is printed after training.
        data: the LightningDataModule's class, or None if the model brings its own dataloaders.
        args: the command line: a subcommand (``fit`` if left out) and ``--key=value`` settings over the config.
    """

    def __init__(
        self, name: str, model: type[LightningModule], data: type[LightningDataModule] | None, args: list[str]
    ):
        self.name = name
        tidy_output()
        try:
            self.start(name, model, data, args)
        except MisconfigurationException as error:  # of the trainer or a callback, before training
            if debugging():
                raise
            fail(f"{' '.join(str(error).split())} (JSONARGPARSE_DEBUG=true shows the traceback)")

    def start(
        self, name: str, model: type[LightningModule], data: type[LightningDataModule] | None, args: list[str]
    ) -> None:
        super().__init__(
            model,
            data,
            args=args,
            parser_class=Parser,
            auto_configure_optimizers=model.configure_optimizers is LightningModule.configure_optimizers,
            parser_kwargs={command: {"default_config_files": [str(CONFIGS / f"{name}.yaml")]} for command in COMMANDS},
            save_config_callback=SaveFitConfig,
            save_config_kwargs={"overwrite": True},  # a resumed run goes on in its own folder
            trainer_defaults={
                "logger": {
                    "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                    "init_args": {"save_dir": "runs", "name": name, "default_hp_metric": False},
                },
                "callbacks": [MonitorCheck()],
            },
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        return super().init_parser(**kwargs, prog=f"python -m recipes {self.name}", allow_abbrev=False)

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--seed_everything", type=Seed, default=0, help="Seed of the weights and the data's order.")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; a ``--ckpt_path`` in a run's folder brings that run's config along, and goes on writing there."""
        assert isinstance(args, list)
        command, *settings = args if args and args[0] in [*COMMANDS, "-h", "--help"] else ["fit", *args]
        self.config = parser.parse_args([command, *settings])
        if not (path := self.config[command].get("ckpt_path")) or path in ("best", "last"):
            return
        if not Path(path).is_file():
            fail(f"ckpt_path: there is no file {str(path)!r}")
        if not is_zipfile(path):
            fail(f"ckpt_path: {str(path)!r} is no checkpoint, or was cut short")
        run = Path(short(path)).parent.parent
        if not (run / "config.yaml").is_file():
            return
        self.config = parser.parse_args([command, f"--config={run / 'config.yaml'}", *settings])
        if logger := getattr(self.config[command].trainer.logger, "init_args", None):
            logger.save_dir, logger.name, logger.version = str(run.parent.parent), run.parent.name, run.name
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")  # as it should

    def instantiate_classes(self) -> None:
        """Build data, model, optimizer and trainer; what refuses its arguments is named in one line."""
        try:
            super().instantiate_classes()
        except (TypeError, ValueError, MisconfigurationException) as error:
            if debugging():
                raise
            fail(f"{blame(error)} (JSONARGPARSE_DEBUG=true shows the traceback)")

    @staticmethod
    def configure_optimizers(
        lightning_module: LightningModule, optimizer: Optimizer, lr_scheduler: LRSchedulerTypeUnion | None = None
    ) -> Any:
        """Name the learning rate's curve "lr", whichever optimizer it belongs to, so that runs can be compared."""
        if lr_scheduler is None:
            return optimizer
        monitor = getattr(lr_scheduler, "monitor", None)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": lr_scheduler, "name": "lr", "monitor": monitor},
        }

    def after_fit(self) -> None:
        """Test the best checkpoint; say how well it did, where everything lies and how to look at it."""
        best = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        report = []
        if is_overridden("test_step", self.model):
            self.trainer.test(self.model, self.datamodule, ckpt_path=best or None, verbose=False)
            metrics = self.trainer.callback_metrics.items()
            report = [(f"test {key.removesuffix('/test')}", f"{value:.4f}") for key, value in metrics]
        if hasattr(self.model, "report"):
            print(f"\n{self.model.report()}")
        if best:
            report.append(("best checkpoint", short(best)))
        if isinstance(logger := self.trainer.logger, TensorBoardLogger):
            tensorboard = Path(sys.executable).with_name("tensorboard")
            report.append(("run", short(logger.log_dir)))
            report.append(("TensorBoard", f"{short(tensorboard)} --logdir {short(logger.root_dir)}"))
            report.append(("dashboard", "its tab Custom Scalars: http://localhost:6006/#custom_scalars"))
        width = max((len(what) for what, _ in report), default=0)
        print("\n" + "\n".join(f"{what:<{width}} {value}" for what, value in report))


def short(path: str | Path) -> str:
    """Return ``path`` as one types it here: relative where it lies below the working directory."""
    path = Path(path).absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def tidy_output() -> None:
    """Silence what Lightning prints for others than the user: its own debts to torch, and advertisements."""
    warnings.filterwarnings(
        "ignore",
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",
        FutureWarning,
        r"lightning\.pytorch\.utilities\._pytree",
    )
    # Workers would only cost here: the recipes' data lie in memory.
    warnings.filterwarnings("ignore", r"The '\w+_dataloader' does not have many workers", PossibleUserWarning)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(is_no_advertisement)


def is_no_advertisement(record: logging.LogRecord) -> bool:
    """Tell Lightning's messages about the run from those about its makers' services."""
    return "Tip: " not in str(record.msg)
