"""`arbs train`: from text to a run folder."""

import math
import shlex
import signal
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from arbs_jax.cli.display import Bar, audit_table, console, errors, loss_text, table
from arbs_jax.cli.options import LogFlags, ModelFlags, about, new_run_path, saved_config, whole
from arbs_jax.cli.runs import admitted, checkpoint_name, make_room
from arbs_jax.cli.text import printable, sample_bytes
from arbs_jax.compilation import enable_cache, measured
from arbs_jax.config import MAY_CHANGE, RunConfig
from arbs_jax.errors import CheckpointError, ConfigError, DataError
from arbs_jax.run.checkpoints import Checkpointer
from arbs_jax.run.compare import MergeReport, resume_tree
from arbs_jax.run.files import write_atomic
from arbs_jax.run.folder import RunFolder
from arbs_jax.run.limbs import to_device, to_host
from arbs_jax.run.metrics import JsonLinesWriter, MultiWriter, TensorBoardWriter, read_metrics
from arbs_jax.run.plots import plot_loss
from arbs_jax.training.inputs import Inputs
from arbs_jax.training.loop import Progress, Trainer, TrainingHalted
from arbs_jax.training.program import Program
from arbs_jax.training.room import check_room, peak_bytes
from arbs_jax.training.step import TrainState

_ARCHITECTURE = frozenset({"preset", "model", "group_size"})


@dataclass(frozen=True)
class Train:
    """Train a byte-level ternary language model whose persistent state is integers only.

    With no flags: a 0.4M-weight model on the documentation text that ships with Python, in a minute or two on two CPU
    cores. The run folder then holds config.json, metrics.jsonl, loss.png, sample.txt, TensorBoard events, checkpoints.

    Ctrl-C and SIGTERM finish the step, save, and exit with status 130 and 143; --resume goes on from there.
    """

    run: Annotated[
        Path | None,
        tyro.conf.arg(
            help="Run folder.", help_behavior_hint="(default: the next free runs/PRESET-RULE-NNN)", metavar="DIR"
        ),
    ] = None
    model: Annotated[ModelFlags, tyro.conf.arg(name="")] = ModelFlags()  # noqa: RUF009
    resume: bool = False
    """Go on with the run in --run, bit for bit as if it had not stopped. Its flags need not be repeated."""
    checkpoint: Annotated[
        str | None,
        tyro.conf.arg(
            help="What to resume from: latest, best, final or a step number.",
            help_behavior_hint="(default: latest)",
            metavar="NAME|STEP",
        ),
    ] = None
    merge: bool = False
    """When resuming into a changed architecture: load what fits, start the rest fresh, and list both."""
    stop_at: Annotated[
        int | None,
        whole("--stop-at"),
        about("Save and stop at this step, leaving schedule and --steps as they are.", "--steps"),
    ] = None
    log: Annotated[LogFlags, tyro.conf.arg(name="")] = LogFlags()  # noqa: RUF009
    save: Annotated[bool, tyro.conf.arg(help="Write no checkpoints.", help_behavior_hint="")] = True

    def resolve(self) -> RunConfig:
        """The configuration: flags on top of the run's (when resuming) or the defaults."""
        for flag, given in (("--merge", self.merge), ("--checkpoint", self.checkpoint is not None)):
            if given and not self.resume:
                raise ConfigError(f"{flag} is for going on with a run; pass --resume as well, or leave it out")
        if self.stop_at is not None and self.stop_at < 1:
            raise ConfigError(f"--stop-at must be at least 1, got {self.stop_at}")
        base = None
        if self.resume:
            if self.run is None:
                raise ConfigError("--resume needs --run DIR: which run should go on?")
            if not RunFolder(self.run).config.exists():
                raise ConfigError(
                    f"nothing to resume in --run {self.run}: it has no config.json; start it without --resume"
                )
            base = saved_config(self.run)
        return self.log.resolve(self.model.resolve(base))


@dataclass(frozen=True)
class Resumed:
    """What a checkpoint holds."""

    tree: dict[str, Any]
    """State on the host."""
    progress: Progress
    data: dict[str, Any]
    """Position in the stream of batches."""


def run(args: Train) -> int:
    """Carries out `arbs train`; returns the exit status."""
    began = time.perf_counter()
    config = args.resolve()
    enable_cache()
    program = Program(config)
    account, room = admitted(program)
    inputs = Inputs.open(config)
    path = args.run or new_run_path(config)
    # Everything that can be wrong with the request is found before the folder is touched.
    resumed = _restore(path, args, program, inputs) if args.resume else None
    facts = inputs.facts() | {"jax": jax.__version__, "logical_ternary_weights": account.logical_ternary_weights}
    document = {**config.to_json(), "unigram_entropy": inputs.unigram_entropy, "facts": facts}
    may_change = MAY_CHANGE | {"unigram_entropy"} | (_ARCHITECTURE if args.merge else frozenset())
    with RunFolder.create(path, document, resume=args.resume, may_change=may_change) as folder, ExitStack() as stack:
        console.print(audit_table(account, f"{config.preset}, rule {config.rule.name}"))
        console.print(f"data {inputs.name}: unigram entropy {inputs.unigram_entropy:.4f} nats/byte; run folder {path}")
        trainer = _prepare(args, program, inputs, folder, resumed, stack, room)
        return _train(args, program, trainer, began, inputs, folder)


def _restore(path: Path, args: Train, program: Program, inputs: Inputs) -> Resumed:
    """The checkpoint to go on from, merged if that was asked for."""
    with Checkpointer(RunFolder(path).checkpoints) as reader:
        if not reader.steps():
            raise CheckpointError(
                f"--run {path} has no checkpoint to resume from; delete the folder or choose another --run, and start "
                "without --resume"
            )
        saved, metadata = reader.restore(checkpoint_name(args.checkpoint or "latest"))
    was, now = RunFolder(path).read_config().get("facts", {}).get("fingerprint"), inputs.facts()["fingerprint"]
    if was != now:
        raise DataError(
            f"--data {inputs.name} is not the text that --run {path} was trained on: fingerprint "
            f"{str(was)[:12]} saved, {now[:12]} now; give the same text, or start another run"
        )
    shapes: Any = program.init_state() if args.merge else program.abstract_state
    wanted = shapes.persistent()
    try:
        tree, report = resume_tree(saved, to_host(wanted) if args.merge else wanted, merge=args.merge)
    except CheckpointError as error:
        raise CheckpointError(f"{error}\nto merge, pass --merge") from None
    program.check(tree["ternary"])
    progress = Progress.from_json(int(tree["step"]), metadata["progress"])
    until = _until(args, program)
    if progress.step >= until:
        flag = "--stop-at" if args.stop_at == until else "--steps"
        raise ConfigError(f"the run is at step {progress.step} already and {flag} is {until}; raise it to go on")
    if args.merge:
        _show_merge(report)
        progress.best = None  # What was best was another model.
    return Resumed(tree, progress, metadata["data"])


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
    resumed: Resumed | None,
    stack: ExitStack,
    room: int | None,
) -> Trainer:
    """The trainer, compiled, positioned, and saved where it starts; `stack` closes what it uses, `room` is what the
    device had of it."""
    batches = inputs.batches()
    stack.callback(batches.close)
    try:
        with measured() as compiled:
            # Before the state is there: the compiler tries kernels out, in memory of its own.
            step = program.compile_step()
        check_room(peak_bytes(step), room)
        make_room(peak_bytes(step), program)
    except BaseException:
        if resumed is None:  # Nothing has begun, and the same command may be given again.
            folder.config.unlink(missing_ok=True)
        raise
    with measured() as started:
        if resumed is None:
            state = program.init_state()
        else:
            state = TrainState(**to_device(resumed.tree, program.placed))
            batches.set_state(resumed.data)
    resume_step = None if resumed is None else resumed.progress.step
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
    progress = Progress() if resumed is None else resumed.progress
    trainer = Trainer(
        program=program,
        step_function=step,
        state=state,
        batches=batches,
        validation=inputs.validation_batches(),
        writer=writer,
        checkpointer=checkpointer,
        watcher=Bar(program, progress.step, _until(args, program)),
        progress=progress,
        saved=resume_step,
    )
    # From here on the run can be resumed, whatever ends it; and a merged one needs its new architecture on disk.
    if resumed is None:
        trainer.save("latest")
    elif args.merge:
        trainer.save("latest", "best")
    if checkpointer is not None:
        checkpointer.wait()
    console.print(f"state in {started}, training step in {compiled}")
    return trainer


def _until(args: Train, program: Program) -> int:
    """The step at which this process ends."""
    steps = program.config.train.steps
    return steps if args.stop_at is None else min(args.stop_at, steps)


def _train(args: Train, program: Program, trainer: Trainer, began: float, inputs: Inputs, folder: RunFolder) -> int:
    """Runs the loop and shows the outcome; a plot is drawn even when the run ends early."""
    assert isinstance(trainer.watcher, Bar)
    until, checkpointer = _until(args, program), trainer.checkpointer
    go_on = f"go on with: arbs train --run {shlex.quote(str(folder.path))} --resume"
    try:
        with trainer.watcher:
            stopped = trainer.run(until)
        if checkpointer is not None:
            checkpointer.wait()
    except TrainingHalted as halted:
        advice = "nothing can be resumed" if checkpointer is None else f"{go_on} --learning-rate X, lower than it was"
        raise TrainingHalted(f"{halted}\n{advice}, or look at the data") from None
    except CheckpointError as error:
        raise CheckpointError(f"{error}\nmake room or mend the folder, then {go_on}") from error
    except KeyboardInterrupt:
        errors.print("the step under way is lost" if checkpointer is None else f"what was saved is whole; {go_on}")
        raise
    finally:
        trainer.writer.flush()
        _plot(program, inputs, folder)
    if stopped is not None or trainer.progress.step < program.config.train.steps:
        console.print(
            f"stopped by {stopped or '--stop-at'} after step {trainer.progress.step} of {program.config.train.steps}; "
            f"{go_on if args.save else 'nothing was saved, as --no-save asked'}"
        )
        return 0 if stopped is None else 128 + signal.Signals[stopped]
    _show_outcome(program, trainer, began, inputs, folder)
    return 0


def _plot(program: Program, inputs: Inputs, folder: RunFolder) -> None:
    """Draws the losses; a picture that cannot be written is no reason to end a run, or to hide what ended it."""
    title = f"{program.config.preset}, rule {program.config.rule.name}, {inputs.name}"
    try:
        plot_loss(read_metrics(folder.metrics), folder.loss_plot, inputs.unigram_entropy, title)
    except CheckpointError as error:
        errors.print(f"warning: {error}", style="yellow")


def _show_outcome(program: Program, trainer: Trainer, began: float, inputs: Inputs, folder: RunFolder) -> None:
    progress, entropy = trainer.progress, inputs.unigram_entropy
    prompt = inputs.validation.read(0, min(32, len(inputs.validation))).tobytes()
    text = prompt + bytes(sample_bytes(program, trainer.state, prompt, 240))
    try:
        write_atomic(folder.samples, text)
    except OSError as error:
        errors.print(f"warning: cannot write the sample {folder.samples}: {error}", style="yellow")
    losses = [
        ("validation", progress.validation),
        ("best validation", progress.best),
        ("training, last steps", progress.train_loss),
        ("unigram entropy", entropy),
        ("gained over unigram", None if progress.validation is None else entropy - progress.validation),
    ]
    rows = [
        (name, loss_text(nats, 4), loss_text(None if nats is None else nats / math.log(2), 4)) for name, nats in losses
    ]
    console.print(table("Result", ("", "nats/byte", "bits/byte"), rows))
    console.print(f"Sample (after the first {len(prompt)} bytes of the validation text)", style="bold")
    console.print(printable(text))
    held = "loss.png, metrics.jsonl, sample.txt" + (", checkpoints" if trainer.checkpointer is not None else "")
    console.print(f"{progress.step} steps, {time.perf_counter() - began:.0f} s in all; {folder.path}/ holds {held}")
    if trainer.checkpointer is not None:
        console.print(f"more text: arbs sample --run {shlex.quote(str(folder.path))}")
