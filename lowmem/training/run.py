"""One training run: its order of work, what it counts, when it is saved."""

import json
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path

import psutil
import torch
from tqdm import tqdm

from lowmem.training import checkpoint, memory, parallel, records, saved_model
from lowmem.training.batches import Batch, Shape
from lowmem.training.data import Data, Scores
from lowmem.training.errors import Diverged, UserError
from lowmem.training.models import CausalLM
from lowmem.training.signals import Signals

BAD_STEPS = 20  # in a row, each with a loss or an update that is not finite, end a run
SCHEDULES = {  # the part of --lr at a part, from 0 to 1, of the steps after the warm-up
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: (1.0 + math.cos(math.pi * done)) / 2,
}


def learning_rate(args, done: int, steps: int) -> float:
    """The learning rate of the step that follows `done` of a run's `steps`."""
    if done < args.warmup_steps:
        return args.lr * (done + 1) / args.warmup_steps
    return args.lr * SCHEDULES[args.schedule]((done - args.warmup_steps) / (steps - args.warmup_steps))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set it for all groups; in place where it is a tensor, which captured graphs read."""
    for group in optimizer.param_groups:
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def seed_everything(seed: int) -> None:
    """Seed Python's and torch's random numbers, on each rank others."""
    random.seed(seed)
    torch.manual_seed(seed + parallel.rank())  # of dropout, which each rank draws for its own rows


class Run:
    """A training run: deals out batches, evaluates, writes `<output_dir>/<run-name>/`, and goes on where it stopped.

    The scripts' loop, within `with Run(...) as run`, is `evaluate` once, then for each of `epochs()`: for each of
    `batches()`, a training step and `after_step`; then `evaluate`; at the very end `finish`. No checkpoint is written
    once an evaluation is recorded, before the next step, so that a resumed run evaluates again and its records have no
    gap and no repeat.
    """

    def __init__(
        self,
        args,
        lm: CausalLM,
        tokenizer,
        optimizer: torch.optim.Optimizer,
        data: Data,
        evaluate: Callable[[], Scores],
        all_at_home: Callable[[], AbstractContextManager] = nullcontext,
        one_gradient: bool = False,
    ):
        """evaluate: scores the held-out rows with the weights as they are.

        optimizer: its `skipped`, if it has that, is an int64 scalar tensor on the device: the updates that it has left
        out because they were not finite. all_at_home: context in which all weights can be read and written.
        one_gradient: whether a gradient is gone before the next comes, for the ledger.
        """
        self.args, self.lm, self.tokenizer, self.optimizer, self.data = args, lm, tokenizer, optimizer, data
        self.score, self.all_at_home = evaluate, all_at_home
        self.gradients = ("gradients", memory.size_in_bytes(map(parallel.own_rows, lm.trained.values())))
        if one_gradient:
            self.gradients = ("largest gradient", max(memory.size_in_bytes([p]) for p in lm.trained.values()))
        self.device = lm.device
        self.memory = memory.Memory(self.device)
        self.steps = data.planned_steps()
        self.dir = Path(args.output_dir) / args.run_name
        self.progress = {
            "epoch": 1, "batch": 0, "step": 0, "rows": 0, "tokens": 0, "target_tokens": 0, "train_seconds": 0.0,
            "losses": [0.0, 0.0], "eval": [],
        }  # fmt: skip
        self.saved_step = self.seconds_to_first_step = self.read_back = None

    def __enter__(self):
        with ExitStack() as opened:  # closed again if anything fails
            self._start(opened)
            self.opened = opened.pop_all()
        return self

    def _start(self, opened):
        """Claim the folder, go on from its checkpoint if there is one, and open the records."""
        args, optimizer = self.args, self.optimizer
        count, total = self.lm.trained_parameters, self.lm.total_parameters
        records.say("parameters", f"{count:,} of {total:,} trained ({100 * count / total:.1f} %)")
        records.say("rows", self.data.describe())
        records.say("tokens", self.data.describe_tokens())
        records.say("steps", f"{self.steps:,}")
        parallel.reshard(self.lm.network)  # after the start-up checks
        self.state = {"args": vars(args), "layout": self.data.layout.NAME}
        if parallel.rank() == 0:
            self.state["fingerprints"] = checkpoint.fingerprints(self.lm, self.data)
            self._claim_folder(opened)
        opened.push(self._advise)
        parallel.wait_for_all()
        checkpoint.wait_for_folder(self.dir)
        self.records = records.Records(self.dir)
        self.signals = opened.enter_context(Signals())
        seed_everything(args.seed)  # whatever loading and the start-up checks drew
        metrics = b""
        if found := checkpoint.last(self.dir) if args.resume else None:
            self.saved_step = checkpoint.step_of(found)
            with self.all_at_home():
                state, metrics = checkpoint.load(found, self.lm.trained, optimizer)
            self.progress = state["progress"]
            print(f"resuming after step {self.saved_step}")
        elif args.resume:
            print("there is no checkpoint yet: starting from the beginning")
        self.records.write("config.json", json.dumps(vars(args), indent=1))
        self.records.open(metrics.decode(), self.progress["step"] if args.resume else None)
        self.losses = torch.tensor(self.progress["losses"], device=self.device)  # since the last log line: sum, number
        skipped = getattr(optimizer, "skipped", None)
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.device) if skipped is None else skipped
        self.skipped_before, self.bad_steps = self.skipped.clone(), torch.zeros_like(self.skipped)
        self.bad_steps_seen = torch.zeros((), dtype=torch.int64, pin_memory=self.device.type == "cuda")
        opened.callback(self.records.close)

    def __exit__(self, *error):
        return self.opened.__exit__(*error)

    def _advise(self, kind, error, trace):
        """Tell an error that ends the run how it goes on."""
        if error is not None and not isinstance(error, Diverged):
            step = self.saved_step
            where = "starts from the beginning" if step is None else f"goes on from step {step}"
            error.go_on = f"the same command with --resume {where}"

    def _claim_folder(self, opened):
        """Make and lock the run's folder, after all is found that would keep it from being filled. Raises UserError."""
        args, network = self.args, self.lm.network
        if not args.no_save_model:
            if parallel.world_size() > 1:
                what = "the fine-tuned model, gathered to be saved (--no_save_model leaves it out),"
                memory.require_host_memory(memory.size_in_bytes(network.parameters()), what)
            self.origin = saved_model.Origin.of(args.model)
            saved_model.check_settings(args.model, network.config, self.tokenizer, self.origin)
        found = checkpoint.last(self.dir) if args.resume else None
        if found:
            checkpoint.require_same_inputs(args, found, self.state["fingerprints"], self.data.layout.NAME)
        size = 0 if args.no_save_model else self._model_bytes()
        if args.epochs:  # an old checkpoint stays until the new one is whole
            size += (1 if found else 2) * checkpoint.bytes_needed(self.lm.trained, self.optimizer)
        checkpoint.require_disk(self.dir, size, "what this run saves")
        try:
            self.dir.mkdir(parents=True, exist_ok=args.resume)
        except FileExistsError as error:
            raise UserError(f"{self.dir} was made meanwhile by another process: take another --run-name") from error
        (self.dir / "metrics.jsonl").touch()
        opened.enter_context(checkpoint.lock(self.dir))
        checkpoint.keep_only(checkpoint.last(self.dir), self.dir)  # a kill may have left more

    @property
    def stopped(self) -> bool:
        """Whether --max_steps are done."""
        return self.args.max_steps is not None and self.progress["step"] >= self.args.max_steps

    def epochs(self) -> Iterator[int]:
        """Yield the numbers of the epochs that are left, the one in progress first."""
        for epoch in range(self.progress["epoch"], self.args.epochs + 1):
            if epoch > self.progress["epoch"]:
                if self.stopped:
                    return
                self.progress.update(epoch=epoch, batch=0)
            yield epoch

    def expected_shapes(self) -> Iterator[Shape]:
        """Yield the `Data.shape` of each batch of the first epoch, and of the later ones before the checkpoint.

        A run that goes on expects what it would by then without the break, also if --epochs or --max_steps changed.
        """
        for epoch in range(1, self.progress["epoch"] + 1):
            end = self.progress["batch"] if 1 < epoch == self.progress["epoch"] else None
            for rows in self.data.training_order(epoch)[:end]:
                yield self.data.shape([self.data.train[row] for row in rows])

    def batches(self, epoch: int) -> Iterator[Batch]:
        """Yield the epoch's remaining batches on the device; write a checkpoint after the last.

        While one is worked on, signals wait: a step is never cut in two.
        """
        order = self.data.training_order(epoch)
        self.memory.start("train")
        self._start_clock()
        done = self.progress["batch"]
        bar = tqdm(total=len(order), initial=done, desc=f"epoch {epoch}", unit="step", mininterval=0.5)
        with self.signals.hold():
            with bar as self.bar:
                for rows in order[done:]:
                    if self.stopped or self.signals.on_any_rank():
                        break
                    set_learning_rate(self.optimizer, learning_rate(self.args, self.progress["step"], self.steps))
                    self.batch = self.data.batch([self.data.train[row] for row in rows])
                    yield self.batch.to(self.device)
            self._stop_clock()
            bad, step = self.bad_steps.item(), self.progress["step"]
            is_last = self.stopped or epoch == self.args.epochs
            if bad >= BAD_STEPS or is_last and 0 < step <= bad:
                self._end_a_bad_run()
            self.checkpoint()

    def after_step(self, loss: torch.Tensor) -> None:
        """Count the step; write the log line and the checkpoint when they are due.

        loss: fp32 scalar on the device, the sum of all ranks' parts. Raises Diverged after BAD_STEPS bad ones in a row.
        """
        progress, args, finite = self.progress, self.args, loss.isfinite()
        self.losses += torch.where(finite, torch.stack([loss, torch.ones_like(loss)]), 0)
        self.bad_steps.add_(1).mul_(~finite | (self.skipped > self.skipped_before))
        self.skipped_before.copy_(self.skipped)
        if self.seconds_to_first_step is None:
            loss.item()  # waits for the device
            self.seconds_to_first_step = time.time() - psutil.Process().create_time()
        progress["step"] += 1
        progress["batch"] += 1
        for name in ("rows", "tokens", "target_tokens"):
            progress[name] += getattr(self.batch, name)
        self.rows_since_start += self.batch.rows
        self._update_bar(loss)
        self.bad_steps_seen.copy_(self.bad_steps, non_blocking=True)
        if self.bad_steps_seen.item() >= BAD_STEPS:  # seen without waiting for the device: up to a second late
            self._end_a_bad_run()
        if progress["step"] % args.log_every == 0:
            self._log_training()
        if args.save_every and progress["step"] % args.save_every == 0:
            self._stop_clock()
            self.checkpoint()
            self._start_clock()

    def _update_bar(self, loss):
        if time.perf_counter() - self.bar_time > 1:  # reading the loss waits for the device: once a second at most
            self.bar_time, skipped = time.perf_counter(), self.skipped.item()
            text = f"loss {loss.item():.3f}, {self._rows_per_second():.1f} rows/s, {self.memory.sample():.2f} GiB"
            self.bar.set_postfix_str(f"{text}, {skipped} updates skipped" if skipped else text, refresh=False)
        self.bar.update()

    def _log_training(self):
        total, number = self.losses.tolist()
        values = {
            "train_loss": total / number if number else None,
            "lr": learning_rate(self.args, self.progress["step"] - 1, self.steps),
            "memory_gib": self.memory.sample(),
            "rows_per_second": self._rows_per_second(),
            "skipped_updates": self.skipped.item(),
        }
        self.records.log(self.progress["step"], self.progress["epoch"], values)
        self.losses.zero_()

    def _end_a_bad_run(self):
        raise Diverged(
            f"{self.bad_steps.item()} steps in a row, up to step {self.progress['step']}, had losses or updates that "
            "are not finite: the run has diverged, or data or machine are faulty; start again with a smaller --lr and "
            "another --run-name"
        )

    def checkpoint(self) -> None:
        """Save this step, unless it is saved already."""
        if self.saved_step == self.progress["step"]:
            return
        self.progress["losses"] = self.losses.tolist()
        with self.all_at_home():
            state = self.state | {"progress": self.progress}
            checkpoint.save(self.dir, state, self.records.kept(), self.lm.trained, self.optimizer)
        self.saved_step = self.progress["step"]

    def evaluate(self, epoch: int) -> None:
        """Score the held-out rows and record them as eval_epoch<epoch>.jsonl; epoch 0 is before training.

        Raises Diverged if a score is not finite.
        """
        if any(e["epoch"] == epoch for e in self.progress["eval"]):
            return
        self.memory.start("eval")
        found, step = self.score(), self.progress["step"]
        if not found.finite:
            why = "the weights are damaged"
            if step:
                why = "the run has diverged; start again with a smaller --lr and another --run-name"
            raise Diverged(f"evaluation after {step} steps gives scores that are not finite: {why}")
        self.records.write(f"eval_epoch{epoch}.jsonl", "".join(json.dumps(row) + "\n" for row in found.rows))
        print(f"epoch {epoch}: {self.data.in_words(found.values)}")
        self.progress["eval"].append({"epoch": epoch, "step": step, "rows": len(found.rows), **found.values})
        self.records.log(step, epoch, found.values)

    def finish(self) -> dict:
        """The summary; saves the model unless told not to, writes summary.json and prints the closing table.

        Of several ranks the memory is that of the one which took most.
        """
        self.memory.sample()
        peaks = self.memory.peaks
        parts = records.ledger(self.lm.network, self.optimizer, self.gradients, peaks.get("train"), self.device)
        of_ranks = parallel.gather_objects((peaks, parts))
        largest = max(range(len(of_ranks)), key=lambda k: max(peak["device"] for peak in of_ranks[k][0].values()))
        if not self.args.no_save_model:
            self._save_model()
        progress, seconds = self.progress, self.progress["train_seconds"]
        summary = {
            "script": self.args.script,
            "run_name": self.args.run_name,
            "args": vars(self.args),
            "trained_params": self.lm.trained_parameters,
            "total_params": self.lm.total_parameters,
            "steps": progress["step"],
            "rows": progress["rows"],
            "target_tokens": progress["target_tokens"],
            "data": self.data.counts,
            "eval": progress["eval"],
            "train_seconds": seconds,
            "seconds_to_first_step": self.seconds_to_first_step,
            "rows_per_second": progress["rows"] / seconds if seconds else None,
            "tokens_per_second": progress["tokens"] / seconds if seconds else None,
            "memory_gib": of_ranks[largest][0],
            "skipped_updates": self.skipped.item(),
            "model_read_back": self.read_back,
            "ledger_gib": of_ranks[largest][1],
            "ranks": parallel.world_size(),
            "memory_of_rank": largest,
            "versions": records.versions(self.device),
        }
        self.records.write("summary.json", json.dumps(summary, indent=1))
        records.print_summary(summary, self.dir, self.data.SCORES)
        return summary

    def _save_model(self):
        """Save the model. Of a sharded one the tensors are gathered one by one, in rank 0's host memory."""
        weights = None
        if parallel.world_size() > 1:
            own = self.lm.network.state_dict(keep_vars=True)
            whole = {tensor: parallel.gathered(tensor) for tensor in dict.fromkeys(own.values())}  # a tied one once
            weights = {name: whole[tensor] for name, tensor in own.items()}
        if parallel.rank() == 0:
            self._write_model(weights)
        parallel.wait_for_all()

    def _write_model(self, weights):
        """Save the model as model/, which has that name once it is complete and found to be what was trained."""
        final, partial = self.dir / "model", self.dir / "model.partial"
        shutil.rmtree(partial, ignore_errors=True)
        checkpoint.require_disk(self.dir, self._model_bytes(), "the model")
        try:
            with self.all_at_home():
                saved_model.save(partial, self.lm.network, self.tokenizer, self.origin, weights)
                checkpoint.flush_all(partial)
                start = time.perf_counter()
                tensors, size = saved_model.read_back(partial, self.lm.network, self.tokenizer, weights)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)  # the room may be all that is missing
            raise
        seconds, gib = time.perf_counter() - start, size / memory.GIB
        self.read_back = {"tensors": tensors, "gib": gib, "seconds": seconds}
        print(f"the saved model, {tensors} tensors, {gib:.2f} GiB, was read back as trained in {seconds:.1f} s")
        old = self.dir / "model.old"
        shutil.rmtree(old, ignore_errors=True)
        if final.is_symlink():
            final.unlink()
        elif final.exists():
            final.rename(old)
        partial.rename(final)
        shutil.rmtree(old, ignore_errors=True)  # NFS keeps what another process reads

    def _model_bytes(self):
        """Bytes of the saved model on the disk, and of experts that are merged beside it while it is read back."""
        experts = [p for p in self.lm.network.parameters() if p.ndim > 2]
        return memory.size_in_bytes([*self.lm.network.parameters(), *experts])

    def _start_clock(self):
        self.clock, self.rows_since_start, self.bar_time = time.perf_counter(), 0, 0.0

    def _stop_clock(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.progress["train_seconds"] += time.perf_counter() - self.clock

    def _rows_per_second(self):
        return self.rows_since_start / (time.perf_counter() - self.clock)
