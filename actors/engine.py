"""One rank's share of a training: its place in the process group, the net, the optimizer, the step.

Imported only inside a rank, after its environment is set. The state is whole on every rank and changes only when a
step is complete, so after a failed step `state()` still gives the state after the last good one.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import deepspeed
import deepspeed.ops
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.utils import logger as deepspeed_logger
from torch.distributed import distributed_c10d

from raymill.actors import data_order
from raymill.actors.checkpoint import decode, encode
from raymill.actors.data_order import Schedule
from raymill.actors.engine_config import engine_config
from raymill.actors.program import F32, ColumnStats, Logits, build_net, export_program, measure
from raymill.actors.scores import auc, log_loss
from raymill.runtime.errors import TrainingError
from raymill.runtime.spec import Train

# DeepSpeed would compile its shared-memory collective at the first process group (49 s, and a rank killed meanwhile
# leaves a lock on which every later start hangs). It asks this table whether it can; the probe is skipped as well.
deepspeed.ops.__compatible_ops__ = {}
deepspeed_logger.setLevel(logging.WARNING)

_EVALUATE_ROWS = 65536
"""Rows evaluated at once: bounds the memory, not the result."""
_BFLOAT16 = "bfloat16"


def device() -> torch.device:
    """Where this rank computes."""
    return torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")


def listen(ranks: int) -> Any:
    """The rendezvous of a group of `ranks`, on a free port of this host (`.port`); its maker must be rank 0."""
    return dist.TCPStore("0.0.0.0", 0, ranks, is_master=True, wait_for_workers=False)


def join(rank: int, ranks: int, store: Any, timeout_s: float) -> None:
    """Become a rank of the group that meets at `store`; collectives fail after `timeout_s`."""
    backend = "nccl" if device().type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    # DeepSpeed makes more groups, without a timeout of their own: torch's default (30 minutes) is taken from here.
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout)
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)


def leave() -> None:
    """Leave the group, if in one; the neighbours' collectives fail at once, which is how news of a death spreads."""
    if deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()
    elif dist.is_initialized():
        dist.destroy_process_group()
    deepspeed.comm.comm.cdb = None


class Engine:
    """A net in training on one rank of a group."""

    def __init__(
        self,
        train: Train,
        declared: dict[str, Any],
        schedule: Schedule,
        x: F32,
        y: F32,
        state: bytes | None,
    ) -> None:
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self._schedule, self._x, self._y = schedule, x, y
        self._device = device()
        arrays, facts = decode(state) if state is not None else ({}, {})
        self._stats = ColumnStats(**{k: tuple(v) for k, v in facts["stats"].items()}) if facts else measure(x)
        torch.manual_seed(schedule.seed)
        net = build_net(train.model, self._stats.inputs)
        self.step_done: int = facts.get("step", 0)
        self.order = bytes.fromhex(facts["order"]) if facts else data_order.NOTHING_YET
        self._loss = torch.tensor(facts.get("loss", [0.0, 0.0]), dtype=torch.float64, device=self._device)
        self._fresh = torch.zeros_like(self._loss)
        self._epoch, self._permutation = -1, np.empty(0, np.int64)
        if facts:
            try:
                net.load_state_dict(_tensors(arrays, "net/", facts["bfloat16"]))
            except RuntimeError as err:
                why = " ".join(str(err).split())
                raise TrainingError(f"the checkpoint does not fit train.model ({why}): use a new training_id") from err
        self._logits = Logits(self._stats, net)
        config = engine_config(train, declared, self._ranks)
        self._engine, self._optimizer, _, self._rate = deepspeed.initialize(
            model=self._logits, config=config, dist_init_required=False
        )
        if facts:
            self._restore_optimizer(arrays, facts)

    def step(self) -> None:
        """One global step; raises whatever the net or the collective raises, and then nothing has changed."""
        batch = self._schedule.batch(self.step_done)
        if batch.start == 0:
            self._loss.zero_()
        rows = self._order_of(batch.epoch)[batch.start : batch.stop]
        mine = rows[data_order.share(len(rows), self._ranks, self._rank)]
        # Seeded by step and rank, so no state of a random generator needs to be kept.
        torch.manual_seed(((self._schedule.seed * 1_000_003 + self.step_done) * 4096 + self._rank) % 2**63)
        x = torch.from_numpy(self._x[mine]).to(self._device)
        y = torch.from_numpy(self._y[mine]).to(self._device)
        logits = self._engine(x).to(torch.float32)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="sum")
        # The engine averages gradients over ranks: scaled so, the average is that of the whole batch's mean loss.
        self._engine.backward(loss * (self._ranks / len(rows)))
        self._engine.step()
        self._fresh += torch.stack(
            [loss.detach().double(), torch.tensor(float(len(mine)), device=self._device).double()]
        )
        self.step_done += 1
        self.order = data_order.extend(self.order, rows)

    def share_loss(self) -> bool:
        """Add up the ranks' losses since the last call; whether the sum is finite."""
        dist.all_reduce(self._fresh)
        return self.keep_own_loss()

    def keep_own_loss(self) -> bool:
        """Count the losses since the last call as they are: after a failure the others' are not to be had."""
        self._loss += self._fresh
        self._fresh = torch.zeros_like(self._loss)
        return bool(torch.isfinite(self._loss).all())

    def epoch_loss(self) -> float:
        """Mean loss over those rows of the present epoch whose loss is known."""
        total, rows = self._loss.tolist()
        return float(total / rows) if rows else float("nan")

    def evaluate(self, x: F32, y: F32) -> tuple[float, float]:
        """Log-loss and AUC on held-out rows, in float32 as the exported program computes."""
        if not len(x):
            return float("nan"), float("nan")
        self._logits.eval()
        with torch.inference_mode():
            parts = [
                torch.sigmoid(self._logits(torch.from_numpy(x[i : i + _EVALUATE_ROWS].copy()).to(self._device)))
                for i in range(0, len(x), _EVALUATE_ROWS)
            ]
        self._logits.train()
        p = torch.cat(parts).float().cpu().numpy()
        return log_loss(p, y), auc(p, y)

    def program(self) -> bytes:
        """The net as it is now, exported."""
        rebuilt = Logits(self._stats, self._logits.net).to("cpu")
        data = export_program(rebuilt, self._x.shape[1])
        self._logits.to(self._device).train()
        return data

    def state(self, facts: dict[str, Any]) -> bytes:
        """Everything a rank needs to go on, and `facts` of the driver's under `driver`."""
        arrays: dict[str, Any] = {}
        half: list[str] = []
        optimizer = self._optimizer.state_dict()
        for name, tensor in self._logits.net.state_dict().items():
            _put(arrays, half, f"net/{name}", tensor)
        plain: dict[str, dict[str, Any]] = {}
        for index, slots in optimizer["state"].items():
            for slot, value in slots.items():
                if isinstance(value, torch.Tensor):
                    _put(arrays, half, f"optimizer/{index}/{slot}", value)
                else:
                    plain.setdefault(str(index), {})[slot] = value
        own = {
            "step": self.step_done,
            "order": self.order.hex(),
            "loss": self._loss.tolist(),
            "stats": asdict(self._stats),
            "bfloat16": half,
            "optimizer_groups": optimizer["param_groups"],
            "optimizer_plain": plain,
            "rate": self._rate.state_dict() if self._rate is not None else None,
            "driver": facts,
        }
        return encode(arrays, own)

    def destroy(self) -> None:
        """Give up the engine, once; the state stays readable."""
        if self._engine is not None:
            self._engine.destroy()
            self._engine = None

    def _order_of(self, epoch: int) -> data_order.Rows:
        if epoch != self._epoch:
            self._permutation = data_order.permutation(self._schedule.seed, epoch, self._schedule.rows)
            self._epoch = epoch
        return self._permutation

    def _restore_optimizer(self, arrays: dict[str, Any], facts: dict[str, Any]) -> None:
        state: dict[int, dict[str, Any]] = {int(i): dict(slots) for i, slots in facts["optimizer_plain"].items()}
        for name, tensor in _tensors(arrays, "optimizer/", facts["bfloat16"]).items():
            index, _, slot = name.partition("/")
            state.setdefault(int(index), {})[slot] = tensor
        groups = [{k: tuple(v) if k == "betas" else v for k, v in g.items()} for g in facts["optimizer_groups"]]
        try:
            self._optimizer.load_state_dict({"state": state, "param_groups": groups})
        except ValueError as err:
            raise TrainingError(f"the checkpoint does not fit train.model ({err}): use a new training_id") from err
        if self._rate is not None and facts["rate"] is not None:
            self._rate.load_state_dict(facts["rate"])


def _put(arrays: dict[str, Any], half: list[str], name: str, tensor: torch.Tensor) -> None:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype is torch.bfloat16:  # numpy has no such type: its bits are kept
        half.append(name)
        tensor = tensor.view(torch.uint16)
    arrays[name] = tensor.numpy()


def _tensors(arrays: dict[str, Any], prefix: str, half: list[str]) -> dict[str, torch.Tensor]:
    found = {}
    for name, array in arrays.items():
        if name.startswith(prefix):
            tensor = torch.from_numpy(array.copy())
            found[name.removeprefix(prefix)] = tensor.view(torch.bfloat16) if name in half else tensor
    return found
