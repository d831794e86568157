"""`arbs train`: from text to a run folder."""

import math
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from arbs_jax.audit import audit, require_integers
from arbs_jax.cli.display import Bar, audit_table, console, table
from arbs_jax.cli.options import ModelFlags, new_run_path, saved_config
from arbs_jax.cli.text import printable, sample_bytes
from arbs_jax.compilation import enable_cache, measured
from arbs_jax.config import MAY_CHANGE, RunConfig
from arbs_jax.errors import ConfigError
from arbs_jax.run.checkpoints import Checkpointer
from arbs_jax.run.compare import MergeReport, resume_tree
from arbs_jax.run.folder import RunFolder
from arbs_jax.run.limbs import to_device, to_host
from arbs_jax.run.metrics import JsonLinesWriter, MultiWriter, TensorBoardWriter, read_metrics
from arbs_jax.run.plots import plot_loss
from arbs_jax.training.inputs import Inputs
from arbs_jax.training.loop import Progress, Trainer, TrainingHalted
from arbs_jax.training.program import Program
from arbs_jax.training.step import TrainState

_ARCHITECTURE = frozenset({"preset", "model", "group_size"})


@dataclass(frozen=True)
class Train:
    """Train a byte-level ternary language model whose persistent state is integers only.

    With no flags: a 0.4M-weight model on the documentation text that ships with Python, in a minute or two on two CPU
    cores. The run folder then holds config.json, metrics.jsonl, loss.png, sample.txt, TensorBoard events, checkpoints.
    """

    model: Annotated[ModelFlags, tyro.conf.arg(name="")] = ModelFlags()  # noqa: RUF009
    run: Annotated[
        Path | None, tyro.conf.arg(help="Run folder (default: the next free runs/PRESET-RULE-NNN).", metavar="DIR")
    ] = None
    resume: bool = False
    """Go on with the run in --run, from its last checkpoint, bit for bit as if it had not stopped."""
    checkpoint: str = "latest"
    """What to resume from: latest, best, final or a step number."""
    merge: bool = False
    """When resuming into a changed architecture: load what fits, start the rest fresh, and list both."""
    stop_at: Annotated[
        int | None, tyro.conf.arg(help="Stop early at this step, leaving schedule and --steps as they are.")
    ] = None
    eval_interval: Annotated[int | None, tyro.conf.arg(help="Steps between validations (default 100).")] = None
    save_interval: Annotated[int | None, tyro.conf.arg(help="Steps between checkpoints (default 500).")] = None
    log_interval: Annotated[int | None, tyro.conf.arg(help="Steps between rows of metrics (default 10).")] = None
    save: bool = True
    """Write checkpoints."""

    def resolve(self) -> RunConfig:
        """The configuration: flags on top of the run's (when resuming) or the defaults."""
        if self.resume and self.run is None:
            raise ConfigError("--resume needs --run DIR: which run should go on?")
        base = saved_config(self.run) if self.resume and self.run is not None else None
        config = self.model.resolve(base)
        looks = {
            name: getattr(self, name)
            for name in ("eval_interval", "save_interval", "log_interval")
            if getattr(self, name) is not None
        }
        return replace(config, log=replace(config.log, **looks))


def run(args: Train) -> None:
    """Carries out `arbs train`."""
    began = time.perf_counter()
    config = args.resolve()
    enable_cache()
    program = Program(config)
    account = audit(
        program.abstract_variables, program.specs, extra=[program.abstract_state.step, program.abstract_state.halted]
    )
    require_integers(account)
    inputs = Inputs.open(config)
    path = args.run or new_run_path(config)
    resumed = _restore(path, args, program) if args.resume else None
    facts = inputs.facts() | {"jax": jax.__version__, "logical_ternary_weights": account.logical_ternary_weights}
    document = {**config.to_json(), "unigram_entropy": inputs.unigram_entropy, "facts": facts}
    may_change = MAY_CHANGE | {"unigram_entropy"} | (_ARCHITECTURE if args.merge else frozenset())
    with RunFolder.create(path, document, resume=args.resume, may_change=may_change) as folder:
        console.print(audit_table(account, f"{config.preset}, rule {config.rule.name}"))
        console.print(f"data {inputs.name}: unigram entropy {inputs.unigram_entropy:.4f} nats/byte; run folder {path}")
        with ExitStack() as stack:
            trainer = _prepare(args, program, inputs, folder, resumed, stack)
            _train(args, program, trainer, began, inputs, folder)


def _restore(path: Path, args: Train, program: Program) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tree on the host, metadata) of the checkpoint to go on from, merged if that was asked for."""
    which = int(args.checkpoint) if args.checkpoint.isdigit() else args.checkpoint
    with Checkpointer(RunFolder(path).checkpoints) as reader:
        saved, metadata = reader.restore(which)
    if args.merge:
        fresh = program.init_state()
        wanted = to_host({"ternary": fresh.ternary, "step": fresh.step, "halted": fresh.halted})
    else:
        shapes = program.abstract_state
        wanted = {"ternary": shapes.ternary, "step": shapes.step, "halted": shapes.halted}
    tree, report = resume_tree(saved, wanted, merge=args.merge)
    if args.merge:
        _show_merge(report)
    program.check(tree["ternary"])
    return tree, metadata


def _show_merge(report: MergeReport) -> None:
    rows = [
        (path, kind)
        for kind, paths in (("loaded", report.loaded), ("new", report.new), ("new (shape changed)", report.changed))
        for path in paths
    ]
    rows += [(path, "dropped") for path in report.dropped]
    console.print(table("Merged checkpoint", ("leaf", "what became of it"), rows))


def _prepare(
    args: Train,
    program: Program,
    inputs: Inputs,
    folder: RunFolder,
    resumed: tuple[dict[str, Any], dict[str, Any]] | None,
    stack: ExitStack,
) -> Trainer:
    """The trainer, compiled and positioned; `stack` closes what it uses."""
    batches = inputs.batches()
    stack.callback(batches.close)
    if resumed is None:
        with measured() as started:
            state = program.init_state()
        progress, resume_step = Progress(), None
    else:
        with measured() as started:
            tree, metadata = resumed
            placed = to_device(tree)
            state = TrainState(ternary=placed["ternary"], step=placed["step"], halted=placed["halted"])
        progress = Progress.from_json(int(tree["step"]), metadata["progress"])
        batches.set_state(metadata["data"])
        resume_step = progress.step
    if progress.step >= (args.stop_at or program.config.train.steps):
        raise ConfigError(
            f"the run is at step {progress.step} already, of --steps {program.config.train.steps}"
            f"{f' and --stop-at {args.stop_at}' if args.stop_at else ''}; nothing is left to do"
        )
    with measured() as compiled:
        step_function = program.compile_step()
    console.print(f"state in {started}, training step in {compiled}")
    writer = MultiWriter(
        [
            JsonLinesWriter(folder.metrics, resume_step=resume_step),
            TensorBoardWriter(folder.tensorboard, resume_step=resume_step),
        ]
    )
    stack.callback(writer.close)
    checkpointer = Checkpointer(folder.checkpoints, keep=program.config.log.keep) if args.save else None
    if checkpointer is not None:
        stack.callback(checkpointer.close)
    until = args.stop_at or program.config.train.steps
    watcher = Bar(program, progress.step, until)
    return Trainer(
        program=program,
        step_function=step_function,
        state=state,
        batches=batches,
        validation=inputs.validation_batches(),
        writer=writer,
        checkpointer=checkpointer,
        watcher=watcher,
        progress=progress,
    )


def _train(args: Train, program: Program, trainer: Trainer, began: float, inputs: Inputs, folder: RunFolder) -> None:
    """Runs the loop and shows the outcome; a plot is drawn even when the run ends early."""
    assert isinstance(trainer.watcher, Bar)
    until = min(args.stop_at or program.config.train.steps, program.config.train.steps)
    stopped = None
    try:
        with trainer.watcher:
            stopped = trainer.run(until)
    except TrainingHalted:
        if trainer.checkpointer is not None:
            trainer.checkpointer.wait()
        raise
    finally:
        trainer.writer.flush()
        plot_loss(
            read_metrics(folder.metrics),
            folder.loss_plot,
            inputs.unigram_entropy,
            f"{program.config.preset}, rule {program.config.rule.name}, {inputs.name}",
        )
    if trainer.checkpointer is not None:
        trainer.checkpointer.wait()
    if stopped is not None:
        hint = f"go on with: arbs train --run {folder.path} --resume" if args.save else "nothing was saved"
        console.print(f"stopped by {stopped} after step {trainer.progress.step}; {hint}")
        return
    _show_outcome(program, trainer, began, inputs, folder)


def _show_outcome(program: Program, trainer: Trainer, began: float, inputs: Inputs, folder: RunFolder) -> None:
    progress, entropy = trainer.progress, inputs.unigram_entropy
    validation = progress.validation if progress.validation is not None else math.nan
    prompt = inputs.validation.read(0, min(32, len(inputs.validation))).tobytes()
    text = prompt + bytes(sample_bytes(program, trainer.state.ternary, prompt, 240))
    folder.samples.write_bytes(text)
    console.print(
        table(
            "Result",
            ("", "nats/byte", "bits/byte"),
            [
                (name, f"{value:.4f}", f"{value / math.log(2):.4f}")
                for name, value in (
                    ("validation", validation),
                    ("best validation", progress.best if progress.best is not None else math.nan),
                    ("training, last steps", progress.train_loss if progress.train_loss is not None else math.nan),
                    ("unigram entropy", entropy),
                    ("gained over unigram", entropy - validation),
                )
            ],
        )
    )
    console.print("[bold]Sample[/] (after the first 32 bytes of the validation text)")
    console.print(printable(text), markup=False)
    console.print(
        f"{progress.step} steps, {time.perf_counter() - began:.0f} s in all; {folder.path}/ holds loss.png, "
        "metrics.jsonl, checkpoints"
    )
