"""A tiny dataset written in milliseconds, for tests of training that need no real puzzles."""

from pathlib import Path

import numpy as np

from hrm_ray.data.format import Manifest
from hrm_ray.data.shards import Dataset, open_dataset
from hrm_ray.data.tasks.tokens import Tokens
from hrm_ray.data.writer import DatasetWriter, balanced_cuts

VOCAB_SIZE, SEQ_LEN = 6, 16


def toy_dataset(
    out: Path,
    *,
    num_train: int = 64,
    num_test: int = 24,
    num_identifiers: int = 1,
    puzzles_per_group: int = 1,
    seed: int = 0,
    rows_per_shard: int = 20,
    vocab_size: int = VOCAB_SIZE,
    seq_len: int = SEQ_LEN,
    kind: type[Tokens] = Tokens,
    is_rated: bool = False,
) -> Dataset:
    """Random tokens; the answer is the question read backwards, every eighth cell not labelled."""
    rng = np.random.default_rng(seed)
    task = kind(vocab_size, seq_len)
    with DatasetWriter(out) as writer:
        splits = {}
        for name, num_groups in (("train", num_train), ("test", num_test)):
            count = num_groups * puzzles_per_group
            inputs = rng.integers(1, vocab_size, (count, seq_len), dtype=np.uint8)
            labels = inputs[:, ::-1].copy()
            labels[:, ::8] = 0
            cuts = balanced_cuts(np.full(num_groups, puzzles_per_group), rows_per_shard)
            split = writer.split(name, task, cuts)
            identifiers = rng.integers(0, num_identifiers, count, dtype=np.int32)
            puzzles = np.arange(count)
            groups = puzzles // puzzles_per_group
            split.add(inputs, labels, identifiers, puzzles, groups, groups * 7 % 11 if is_rated else None)
            splits[name] = split.finish()
        manifest = Manifest(
            task=task.name,
            task_options=task.options,
            vocab_size=task.vocab_size,
            seq_len=task.seq_len,
            pad_id=0,
            ignore_label_id=0,
            blank_identifier_id=0,
            num_puzzle_identifiers=num_identifiers,
            seed=seed,
            recipe={},
            source_digest="",
            report={},
            splits=splits,
        )
        writer.finish(manifest)
    return open_dataset(out)


ARCH = {
    "hidden_size": 32,
    "num_heads": 2,
    "H_layers": 1,
    "L_layers": 1,
    "puzzle_emb_ndim": 32,
    "halt_max_steps": 4,
    "halt_exploration_prob": 0.3,
}
TRM = {
    **{k: v for k, v in ARCH.items() if k != "H_layers"},
    "name": "trm",
    "L_cycles": 2,
    "puzzle_emb_len": 2,
}
DECODER = {"name": "decoder", "hidden_size": 32, "num_heads": 2, "dropout": 0.1}
EQR = {"init_std": 1.0, "noise": 0.1, "damping": 0.9}  # with noise that is seen


def toy_config(data_path: Path, storage: Path, **values) -> dict:
    """Values of a `TrainConfig` that trains for 20 steps in a second; nested keys replace whole parts."""
    return {
        "data_path": str(data_path),
        "storage": str(storage),
        "run_name": "toy",
        "arch": ARCH,
        "global_batch_size": 8,
        "micro_batch_size": 8,  # so that an evaluation has several batches
        "epochs": 3,
        "max_steps": 20,
        "eval_interval": 1,
        "lr": 1e-3,
        "lr_warmup_steps": 4,
        "lr_min_ratio": 0.1,
        "log_interval": 5,
        "device": "cpu",
        "forward_dtype": "float32",
        "tensorboard": False,
        "scaling": {"mode": "local"},
        **values,
    }
