"""What the recipes share: a LightningCLI with a config of its own, one-line errors and a report at the end."""

import inspect
import re
import signal
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse.typing import restricted_number_type
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    LRSchedulerTypeUnion,
    SaveConfigCallback,
)
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim import Optimizer

from recipes import checkpoints
from recipes.errors import binary, blame, debugging, did_you_mean, explain, fail
from recipes.output import say, short, tidy_output
from recipes.parser import COMMANDS, Parser
from torchcalc.instruments import ExactResume
from torchcalc.resume import newest

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**32)])


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


class Divergence(Callback):
    """End a training whose validation loss is nan: its weights are, and no step leads back.

    A training loss may be nan for other reasons, such as a step that ``skip_nonfinite`` left out.
    """

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loss = trainer.callback_metrics.get("loss/val")
        if loss is not None and loss.isnan() and not trainer.sanity_checking:
            trainer.should_stop = True


class Record(SaveConfigCallback):
    """Keep with a run what made it: ``config.yaml`` in its folder, the recipe's name in every checkpoint.

    The config is saved when training begins. One that could not begin, or a test of a checkpoint, leaves it as it is.
    """

    def __init__(self, *args: Any, recipe: str, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.recipe = recipe

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pass

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().setup(trainer, pl_module, "fit")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["recipe"] = self.recipe


class RecipeCLI(LightningCLI):
    """``fit`` trains with ``configs/NAME.yaml``, tests the best checkpoint and says where everything lies.

    Args:
        name: the recipe's name; its config is ``configs/NAME.yaml``, its runs lie in ``runs/NAME``.
        model: the LightningModule's class; if it has a method ``report() -> str``, that is printed after training. Its
            attribute ``many`` says that several processes train it as one does.
        data: the LightningDataModule's class, or None if the model brings its own dataloaders.
        args: the command line: a subcommand (``fit`` if left out) and ``--key=value`` settings over the config.
    """

    def __init__(
        self, name: str, model: type[LightningModule], data: type[LightningDataModule] | None, args: list[str]
    ):
        self.name = name
        self.checkpoint: tuple[Path, dict[str, Any]] | None = None  # what --ckpt_path names, and its content
        tidy_output()
        try:
            self.start(name, model, data, args)
        except SIGTERMException:
            self.interrupted(signal.SIGTERM)
        except SystemExit as end:
            if isinstance(end.__context__, KeyboardInterrupt):  # Lightning has caught it
                self.interrupted(signal.SIGINT)
            raise
        except Exception as error:
            said = explain(error)
            if said is None or debugging():
                raise
            fail(f"{said} (JSONARGPARSE_DEBUG=true shows the traceback)")

    def start(
        self, name: str, model: type[LightningModule], data: type[LightningDataModule] | None, args: list[str]
    ) -> None:
        own = {
            "default_config_files": [str(CONFIGS / f"{name}.yaml")],
            "usage": f"python -m recipes {name} [{' | '.join(COMMANDS)}] [--setting=value ...]",
            "description": inspect.getdoc(inspect.getmodule(model)),
        }
        super().__init__(
            model,
            data,
            args=args,
            parser_class=Parser,
            auto_configure_optimizers=model.configure_optimizers is LightningModule.configure_optimizers,
            parser_kwargs={command: dict(own) for command in COMMANDS},
            save_config_callback=Record,
            save_config_kwargs={"recipe": name, "overwrite": True},  # a resumed run goes on in its own folder
            trainer_defaults={
                "logger": {
                    "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                    "init_args": {"save_dir": "runs", "name": name, "default_hp_metric": False},
                },
                "callbacks": [MonitorCheck(), Divergence()],
            },
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, without ``predict``: no recipe has what it needs."""
        return {command: needs for command, needs in LightningCLI.subcommands().items() if command in COMMANDS}

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        (path,) = (action for action in parser._actions if action.dest == "ckpt_path")
        path.help = "The checkpoint to go on from, or to measure; best and last mean those of the newest run."
        return parser

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        return super().init_parser(**kwargs, prog=f"python -m recipes {self.name}", allow_abbrev=False)

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--seed_everything", type=Seed, default=0, help="Seed of the weights and the data's order.")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; a ``--ckpt_path`` in a run's folder brings that run's config along, and goes on writing there."""
        assert isinstance(args, list)
        command, *settings = args if args and args[0] in COMMANDS else ["fit", *args]
        if {"-h", "--help"} & set(settings):
            self._subcommand_parsers[command].print_help()
            raise SystemExit(0)
        try:
            self.config = parser.parse_args([command, *settings])
        except UnicodeDecodeError:
            fail(f"{binary(settings)} is no text; settings in a file are YAML")
        if not (given := self.config[command].get("ckpt_path")):
            return
        if given in checkpoints.WORDS and self.config[command].trainer.logger is False:
            fail(f"ckpt_path: {given!r} is that of the newest run, and trainer.logger=false keeps none: name the file")
        path = checkpoints.find(str(given), self.runs(command))
        weights_only = self.config[command].get("weights_only") is not False
        self.checkpoint = path, checkpoints.read(path, self.name, weights_only)
        run = path.absolute().parent.parent
        if (run / "config.yaml").is_file():
            self.config = parser.parse_args([command, f"--config={run / 'config.yaml'}", *settings])
            if logger := getattr(self.config[command].trainer.logger, "init_args", None):
                version = re.fullmatch(r"version_(0|[1-9]\d*)", run.name)
                if Path(logger.save_dir, logger.name).resolve() != run.parent.resolve():
                    logger.save_dir, logger.name = short(run.parent.parent), run.parent.name
                # Otherwise as it was: a ModelCheckpoint whose folder is spelled otherwise forgets its best score.
                logger.version = int(version[1]) if version else run.name  # of a word the bar shows the last letters
                warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")  # as it should
        self.config[command].ckpt_path = str(path)

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would look for settings in the checkpoint, and they come from its run's config."""

    def runs(self, command: str) -> Path:
        """Where the recipe's runs lie."""
        where = getattr(self.config[command].trainer.logger, "init_args", None)
        return Path(getattr(where, "save_dir", "runs"), str(getattr(where, "name", self.name)))

    def instantiate_classes(self) -> None:
        """Build data, model, optimizer and trainer; what refuses its arguments is named in one line."""
        try:
            super().instantiate_classes()
        except (TypeError, ValueError, MisconfigurationException) as error:
            if debugging():
                raise
            fail(f"{blame(error)} (JSONARGPARSE_DEBUG=true shows the traceback)")
        if self.trainer.num_devices * self.trainer.num_nodes > 1 and not getattr(self.model, "many", False):
            fail(f"trainer.devices: {self.name} learns on one process; leave trainer.devices and trainer.num_nodes out")
        for callback in self.trainer.checkpoint_callbacks:
            if isinstance(callback, ExactResume):
                callback.quiet = True  # interrupted() says more
        if self.checkpoint:
            path, content = self.checkpoint
            # A checkpoint in pieces has no state_dict, and the model may get its net later.
            if self.model.strict_loading and self.model.state_dict() and "state_dict" in content:
                checkpoints.compare(path, content, self.model)
            self.checkpoint = path, {"global_step": content.get("global_step")}  # the trainer reads the rest anew

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
        ended = self.trainer.callback_metrics  # of the last epoch; the test begins anew
        losses = {tag: ended[tag] for tag in ("loss/train", "loss/val") if tag in ended}
        diverged = [f"{tag} is {float(loss)}" for tag, loss in losses.items() if not loss.isfinite()]
        steps = self.trainer.global_step
        keeper = self.trainer.checkpoint_callback
        best, score = getattr(keeper, "best_model_path", ""), getattr(keeper, "best_model_score", None)
        if diverged if score is None else not score.isfinite():  # without a monitor the newest counts as the best
            best = ""
        report = []
        last = getattr(keeper, "last_model_path", "")
        no_step = False
        if self.checkpoint and self.checkpoint[1]["global_step"] == steps:
            last, no_step = last or self.checkpoint[0], True
            self.model.on_train_end()  # it may have been killed while it drew its figures
        if is_overridden("test_step", self.model):
            self.trainer.test(self.model, self.datamodule, ckpt_path=best or None, verbose=False)
            metrics = self.trainer.callback_metrics.items()
            report = [(f"test {key.removesuffix('/test')}", f"{value:.4f}") for key, value in metrics]
        if not self.trainer.is_global_zero:
            raise SystemExit(int(bool(diverged)))
        if hasattr(self.model, "report"):
            print(f"\n{self.model.report()}")
        if best:
            report.append(("best checkpoint", short(best)))
        elif last:
            report.append(("last checkpoint", short(last)))
        say([*report, *self.places()])
        if no_step:
            limit = "max_epochs" if self.trainer.max_steps == -1 else "max_steps"
            sys.stderr.write(
                f"warning: no step was made: the checkpoint has all {steps}; --trainer.{limit} allows more\n"
            )
        if diverged:
            remedy = "the training diverged; try a smaller learning rate"
            sys.stderr.write(f"error: after {steps} steps {' and '.join(diverged)}: {remedy}\n")
            raise SystemExit(1)

    def after_test(self) -> None:
        """Say so where there was no checkpoint to measure."""
        if self.checkpoint is None and self.trainer.is_global_zero:
            last = checkpoints.newest(self.runs(str(self.subcommand)), "best")
            there = f"; --ckpt_path=best would be {short(last)}" if last else ""
            sys.stderr.write(f"warning: no --ckpt_path: these are the figures of a net that was not trained{there}\n")

    after_validate = after_test

    def interrupted(self, by: signal.Signals) -> NoReturn:
        """Say where the run lies and how it goes on."""
        if not self.trainer.is_global_zero:
            raise SystemExit(128 + by)
        epoch = self.trainer.current_epoch
        logger = self.trainer.logger
        where = logger.log_dir if isinstance(logger, TensorBoardLogger) else self.trainer.default_root_dir
        run = Path(where, "checkpoints")
        saved = newest(run, "last*.ckpt") or newest(run)
        command = f"{short(sys.executable)} -m recipes {self.name} --ckpt_path={short(saved)}" if saved else ""
        say(
            [("interrupted", f"in epoch {epoch}"), *self.places(), ("resume", command or "no checkpoint was saved yet")]
        )
        raise SystemExit(128 + by)  # as a shell reports it

    def places(self) -> list[tuple[str, str]]:
        """Where the run lies, and how to look at it."""
        if not isinstance(logger := self.trainer.logger, TensorBoardLogger):
            return []
        tensorboard = Path(sys.executable).with_name("tensorboard")
        return [
            ("run", short(logger.log_dir)),
            ("TensorBoard", f"{short(tensorboard)} --logdir {short(logger.root_dir)}"),
            ("dashboard", "its tab Custom Scalars: http://localhost:6006/#custom_scalars"),
        ]
