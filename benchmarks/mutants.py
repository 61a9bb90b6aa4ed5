"""Do the tests notice when a line that decides a number is wrong?

    python benchmarks/mutants.py                  all mutants; exit code 1 if one survives
    python benchmarks/mutants.py winner interval  those whose name or file contains one of the words
    python benchmarks/mutants.py --jobs 4

A mutant is one small change of one line: another loss, another winner, another unit, another order. Each is made in a
copy of the tree, never in the tree itself, and the tests named beside it run there. Killed: a test fails. Survived: all
pass, so nothing would notice that mistake. All named tests first run once without any change: they must pass, or a
mutant would be killed by nothing. A mutant whose text is not found exactly once stops the run: the code has moved, so
move the mutant with it.

Choose the smallest selection of tests that kills a mutant: what it costs is paid for each of them.
"""

import argparse
import compileall
import multiprocessing
import os
import py_compile
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).resolve().parent.parent
_LIMIT_S = 600  # of a mutant's tests: what hangs is no mistake that a test noticed

_SERVER = multiprocessing.get_context("forkserver")
# Imported, but nothing of deltacache, by the process that children are forked from: that takes longer than most tests.
_LIBRARIES = (
    "cv2",
    "hypothesis",
    "pandas",
    "pyarrow.parquet",
    "pytest",
    "ray",
    "scipy.stats",
    "torch",
    "transformers",
    "zarr",
)


@dataclass(frozen=True, slots=True)
class Mutant:
    """One wrong line.

    Attributes:
        name: what would be wrong, in a few words.
        file: below ``src/deltacache``.
        old: the exact text; it must be in the file exactly once.
        new: what takes its place.
        tests: what is given to pytest, below ``tests``: a file, or a file and ``::test``.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


# Losses, winners, aggregation, intervals, geometry, models.
NUMBERS = (
    Mutant(
        "smooth-L1 with another beta",
        "models/futures.py",
        "SMOOTH_L1_BETA = 0.1",
        "SMOOTH_L1_BETA = 1.0",
        ("evaluate/test_evaluate_metrics.py",),
    ),
    Mutant(
        "absolute instead of squared error",
        "evaluate/metrics.py",
        "squared = (prediction - target).square()",
        "squared = (prediction - target).abs()",
        ("evaluate/test_evaluate_metrics.py",),
    ),
    Mutant(
        "cosine without the root of the squares",
        "evaluate/metrics.py",
        "return dot / squares.sqrt().clamp_min",
        "return dot / squares.clamp_min",
        ("evaluate/test_evaluate_metrics.py",),
    ),
    Mutant(
        "distance over one patch only",
        "evaluate/metrics.py",
        "return (tokens - others).square().sum((-2, -1), dtype=torch.float64).sqrt()",
        "return (tokens - others).square().sum(-1, dtype=torch.float64).sqrt().mean(-1)",
        ("evaluate/test_evaluate_metrics.py",),
    ),
    Mutant(
        "values that are not finite pass",
        "evaluate/metrics.py",
        'if not bool(torch.isfinite(values).all()):\n        raise NotFiniteError(\n            f"{method} predicts',
        'if not bool(torch.isfinite(values).any()):\n        raise NotFiniteError(\n            f"{method} predicts',
        ("evaluate/test_evaluate_metrics.py",),
    ),
    Mutant(
        "pixels that are ignored are counted",
        "evaluate/benchmarks/labels.py",
        "valid = labels != IGNORE",
        "valid = labels >= 0",
        ("evaluate/test_pooled.py",),
    ),
    Mutant(
        "hits counted by the predicted pixels",
        "evaluate/benchmarks/labels.py",
        "parts = (labelled[predicted == labelled], predicted, labelled)",
        "parts = (predicted, predicted, labelled)",
        ("evaluate/test_pooled.py",),
    ),
    Mutant(
        "unknown depth is counted",
        "evaluate/benchmarks/labels.py",
        "valid = truth > 0",
        "valid = truth >= 0",
        ("evaluate/test_pooled.py",),
    ),
    Mutant(
        "relative error to the prediction",
        "evaluate/benchmarks/labels.py",
        "(error / known).sum()",
        "(error / predicted).sum()",
        ("evaluate/test_pooled.py",),
    ),
    Mutant(
        "another threshold of delta1",
        "evaluate/benchmarks/labels.py",
        "_CLOSE = 1.25",
        "_CLOSE = 1.35",
        ("evaluate/test_pooled.py",),
    ),
    Mutant(
        "delta1 looks one way only",
        "evaluate/benchmarks/labels.py",
        "torch.maximum(predicted / known, known / predicted)",
        "predicted / known",
        ("evaluate/test_pooled.py",),
    ),
    Mutant(
        "union without the hits taken off",
        "evaluate/metrics.py",
        "union = predicted + labelled - intersection",
        "union = predicted + labelled",
        ("evaluate/test_pooled.py",),
    ),
    Mutant(
        "mIoU over all classes, seen or not",
        "evaluate/metrics.py",
        "seen = (union > 0).sum(-1)",
        "seen = union.shape[-1]",
        ("evaluate/test_pooled.py",),
    ),
    Mutant(
        "accuracy of the predicted pixels",
        "evaluate/metrics.py",
        "intersection.sum(-1) / labelled.sum(-1)",
        "intersection.sum(-1) / union.sum(-1)",
        ("evaluate/test_pooled.py",),
    ),
    Mutant(
        "RMSE without the root",
        "evaluate/metrics.py",
        '{"rmse": np.sqrt(squared / count)',
        '{"rmse": squared / count',
        ("evaluate/test_pooled.py",),
    ),
    Mutant(
        "spread-skill upside down",
        "evaluate/metrics.py",
        "np.sqrt(variance / squared)",
        "np.sqrt(squared / variance)",
        ("evaluate/test_pooled.py",),
    ),
    Mutant(
        "hits and predictions change places",
        "evaluate/metrics.py",
        "intersection, predicted, labelled = np.split(totals, 3, axis=-1)",
        "predicted, intersection, labelled = np.split(totals, 3, axis=-1)",
        ("evaluate/test_pooled.py",),
    ),
    Mutant(
        "rank shares of another total",
        "evaluate/metrics.py",
        "shares = ranks / ranks.sum(-1, keepdims=True)",
        "shares = ranks / count[..., None]",
        ("evaluate/test_pooled.py",),
    ),
    Mutant(
        "biased energy score",
        "evaluate/metrics.py",
        "between / (2 * count * (count - 1))",
        "between / (2 * count * count)",
        ("evaluate/test_pooled.py",),
    ),
    Mutant(
        "energy score in float32",
        "evaluate/metrics.py",
        "numbers = part.double()",
        "numbers = part.half().double()",
        ("evaluate/test_pooled.py",),
    ),
    Mutant(
        "variance of another number of samples",
        "evaluate/metrics.py",
        "variance * (count + 1) / count, squared]",
        "variance, squared]",
        ("evaluate/test_pooled.py",),
    ),
    Mutant(
        "ranks count ties as below",
        "evaluate/metrics.py",
        "self._below += (samples < self._truth)",
        "self._below += (samples > self._truth)",
        ("evaluate/test_pooled.py",),
    ),
    Mutant(
        "futures of a video start as early as they can",
        "pipeline/decoding/sampling.py",
        "at_s = max(span, last - window.steps * spacing)",
        "at_s = span",
        ("evaluate/test_predict.py::test_windows_of_frames",),
    ),
    Mutant(
        "the spread of samples is that to their mean",
        "evaluate/prediction/run.py",
        "(2 * each.var(0).mean()).sqrt()",
        "each.var(0).mean().sqrt()",
        ("evaluate/test_predict.py::test_a_video_gives_what_its_features_give",),
    ),
    Mutant(
        "clips of several datasets lose their order",
        "train/clip_dataset.py",
        "batch[name] = torch.cat(joined)[order]",
        "batch[name] = torch.cat(joined)",
        ("train/test_clip_dataset.py::test_clips_are_those_of_the_datasets",),
    ),
    Mutant(
        "best by squared error (clips)",
        "evaluate/clips/rollouts.py",
        "winners = metrics[:, :, 0].argmin(0)",
        "winners = metrics[:, :, 1].argmin(0)",
        (
            "evaluate/test_sample_counts.py::test_the_best_sample_has_the_lowest_smooth_l1_not_the_lowest_squared_error",
        ),
    ),
    Mutant(
        "best by squared error (benchmarks)",
        "evaluate/benchmarks/sampling.py",
        "return int(self.metrics[:, 0].argmin())",
        "return int(self.metrics[:, 1].argmin())",
        (
            "evaluate/test_sample_counts.py::test_the_best_sample_has_the_lowest_smooth_l1_not_the_lowest_squared_error",
        ),
    ),
    Mutant(
        "the worst sample is the best",
        "evaluate/benchmarks/sampling.py",
        "return int(self.metrics[:, 0].argmin())",
        "return int(self.metrics[:, 0].argmax())",
        (
            "evaluate/test_sample_counts.py::test_the_best_sample_has_the_lowest_smooth_l1_not_the_lowest_squared_error",
        ),
    ),
    Mutant(
        "the unit of features is the sequence",
        "evaluate/predictions.py",
        "yield Statistic(series, about.sequence_id, about.video, seconds, totals)",
        "yield Statistic(series, about.sequence_id, about.sequence_id, seconds, totals)",
        ("evaluate/test_evaluate_clips.py::test_views_of_one_video_are_one_unit",),
    ),
    Mutant(
        "the unit of samples is the sequence",
        "evaluate/clips/rollouts.py",
        "yield Statistic(series, about.sequence_id, about.video, seconds, totals)",
        "yield Statistic(series, about.sequence_id, about.sequence_id, seconds, totals)",
        ("evaluate/test_evaluate_clips.py::test_views_of_one_video_are_one_unit",),
    ),
    Mutant(
        "intervals over sequences, not units",
        "evaluate/statistics.py",
        "units.setdefault(statistic.group, len(units))",
        "units.setdefault(statistic.sequence_id, len(units))",
        ("evaluate/test_evaluate_clips.py::test_views_of_one_video_are_one_unit",),
    ),
    Mutant(
        "compare leaves out sequences, not units",
        "evaluate/comparing.py",
        "group_sums(each.totals, a.units)",
        "group_sums(each.totals, a.sequences)",
        ("evaluate/test_compare.py::test_sequences_of_one_video_are_one_unit",),
    ),
    Mutant(
        "sequences paired in the order of the file",
        "evaluate/comparing.py",
        "order = np.array([place[name] for name in own])",
        "order = np.arange(len(own))",
        ("evaluate/test_compare.py::test_sequences_in_another_order_are_paired_by_name",),
    ),
    Mutant(
        "jackknife without its factor",
        "evaluate/metrics.py",
        "variance = (count - 1) / count *",
        "variance = 1 / count *",
        ("evaluate/test_intervals.py",),
    ),
    Mutant(
        "normal instead of Student's t",
        "evaluate/metrics.py",
        "special.stdtrit(freedom, (1 + CONFIDENCE) / 2)",
        "special.ndtri((1 + CONFIDENCE) / 2)",
        ("evaluate/test_intervals.py",),
    ),
    Mutant(
        "one-sided quantile",
        "evaluate/metrics.py",
        "(1 + CONFIDENCE) / 2",
        "CONFIDENCE",
        ("evaluate/test_intervals.py",),
    ),
    Mutant(
        "degrees of freedom as if units were of one size",
        "evaluate/metrics.py",
        "return max(1.0, 1 / np.square(shares).sum() - 1)",
        "return len(shares) - 1.0",
        ("evaluate/test_intervals.py",),
    ),
    Mutant(
        "two units are enough",
        "evaluate/metrics.py",
        "FEWEST_UNITS = 3",
        "FEWEST_UNITS = 2",
        ("evaluate/test_intervals.py",),
    ),
    Mutant(
        "intervals without width",
        "evaluate/metrics.py",
        "if high - low > _NO_WIDTH * abs(value):",
        "if high - low >= 0:",
        ("evaluate/test_intervals.py",),
    ),
    Mutant(
        "differences without width",
        "evaluate/metrics.py",
        "if half > _NO_WIDTH * max(abs(whole[0][metric]), abs(whole[1][metric])):",
        "if half >= 0:",
        ("evaluate/test_compare.py::test_the_same_difference_in_every_unit_is_explained",),
    ),
    Mutant(
        "losses on a plain scale",
        "evaluate/metrics.py",
        "(np.log, np.exp)",
        "_PLAIN",
        ("evaluate/test_intervals.py",),
    ),
    Mutant(
        "the difference is A less B",
        "evaluate/metrics.py",
        "middle = whole[1][metric] - whole[0][metric]",
        "middle = whole[0][metric] - whole[1][metric]",
        ("evaluate/test_compare.py::test_a_shift_of_all_sequences_is_seen_and_has_a_direction",),
    ),
    Mutant(
        "models of another image size pass for their own",
        "evaluate/statistics.py",
        '", ".join(other_sizes) or None',
        "None",
        ("evaluate/test_evaluate_refusals.py::test_models_of_another_image_size_are_named_in_every_row",),
    ),
    Mutant(
        "reached from anywhere nearest",
        "evaluate/clips/scenes.py",
        "close = distances.min(1) < separations(between)[nearest] / 2",
        "close = distances.min(1) < separations(between)[nearest]",
        ("evaluate/test_modes.py",),
    ),
    Mutant(
        "coverage of any future",
        "evaluate/clips/scenes.py",
        "np.isin(np.arange(futures), reached).all()",
        "np.isin(np.arange(futures), reached).any()",
        ("evaluate/test_modes.py",),
    ),
    Mutant(
        "balance by the largest count",
        "evaluate/clips/scenes.py",
        "futures * counts.min()",
        "futures * counts.max()",
        ("evaluate/test_modes.py",),
    ),
    Mutant(
        "the second crop at the first one's place",
        "pipeline/benchmarks/frames.py",
        "(height - self.size, width - self.size)",
        "(0, 0)",
        ("evaluate/test_benchmark_geometry.py",),
    ),
    Mutant(
        "aspect beyond 1:2",
        "pipeline/benchmarks/frames.py",
        "_MOST_ASPECT * size)\n    return",
        "9 * size)\n    return",
        ("evaluate/test_benchmark_geometry.py",),
    ),
    Mutant(
        "overlapping crops are squeezed into their half",
        "pipeline/benchmarks/frames.py",
        "    if not split.overlap:\n        return _resize(predictions, half)",
        "    if split.overlap:\n        return _resize(predictions, half)",
        ("evaluate/test_benchmark_geometry.py",),
    ),
    Mutant(
        "the second crop is cut at the wrong end",
        "pipeline/benchmarks/frames.py",
        "square[:, :, side - height :, side - width :]",
        "square[:, :, :height, :width]",
        ("evaluate/test_benchmark_geometry.py",),
    ),
    Mutant(
        "frames from the beginning",
        "pipeline/benchmarks/windows.py",
        "frames=each.frames[-count:]",
        "frames=each.frames[:count]",
        ("pipeline/test_benchmark_layouts.py::test_a_sequence_is_cut_to_the_frames_before_its_label",),
    ),
    Mutant(
        "log-cosh without its constant",
        "models/blocks.py",
        "- math.log(2.0)",
        "",
        ("models/test_losses.py",),
    ),
    Mutant(
        "smooth-L1 of twice the beta",
        "models/blocks.py",
        "(distance < beta) *",
        "(distance < 2 * beta) *",
        ("models/test_losses.py",),
    ),
    Mutant(
        "closed loop from true frames",
        "models/deltatok.py",
        "current = self.decode(self.encode(current, target, grid), current, grid)",
        "current = self.decode(self.encode(current, target, grid), target, grid)",
        ("models/test_deltatok.py",),
    ),
    Mutant(
        "parallel decodes from the first frame alone",
        "models/deltatok.py",
        "            current = self.decode(delta, current, grid)\n            frames.append(current)",
        "            frames.append(self.decode(delta, current, grid))",
        ("models/test_deltatok.py",),
    ),
    Mutant(
        "one step under the name of parallel",
        "evaluate/predictions.py",
        'yield tokenizer.method("deltatok_parallel"), parallel[:, steps]',
        'yield tokenizer.method("deltatok_parallel"), _decode_one_step(tokenizer, batch, deltas[:clips], protocol)',
        ("evaluate/test_evaluate_clips.py::test_parallel_is_what_the_released_readme_calls_so",),
    ),
    Mutant(
        "periods of other lengths",
        "models/blocks.py",
        "_FASTEST_EXPONENT = -2.0, 2.0",
        "_FASTEST_EXPONENT = -2.0, 1.0",
        ("models/test_golden_world.py::test_best_of_many_loss_winners_and_gradients",),
    ),
)

# Schedules, order, splits, fingerprints, selection.
TRAINING = (
    Mutant(
        "a split that depends on the order of the videos",
        "pipeline/datasets/choice.py",
        'f"split {seed} {video_id}"',
        'f"split {seed} {id(video_id)}"',
        ("train/test_data_choice.py::test_a_split_follows_from_video_and_seed_alone",),
    ),
    Mutant(
        "a mixture that begins its parts again in every period",
        "train/order.py",
        "own = periods[mine] * share + ranks[places[mine]]",
        "own = ranks[places[mine]]",
        ("train/test_data_choice.py::test_a_mixture_has_its_shares_and_goes_through_each_part_in_epochs",),
    ),
    Mutant(
        "the newest checkpoint as the best",
        "train/validation.py",
        "return BestSoFar(step, loss, self.best_step, self.best_loss, self.waited + 1)",
        "return BestSoFar(step, loss, step, loss, self.waited + 1)",
        ("train/test_data_choice.py::test_validation_is_logged_and_the_best_checkpoint_is_kept",),
    ),
    Mutant(
        "side arrays from the row after a frame",
        "pipeline/inputs/side_arrays.py",
        'np.searchsorted(times, frames + close, side="right") - 1',
        'np.searchsorted(times, frames + close, side="right")',
        ("pipeline/test_side_arrays.py::test_each_frame_gets_the_row_that_the_rule_says",),
    ),
    Mutant(
        "the same order in every epoch",
        "train/order.py",
        "shuffled(purpose, seed, epoch, count, places[chosen])",
        "shuffled(purpose, seed, 0, count, places[chosen])",
        ("train/test_order.py",),
    ),
    Mutant(
        "the same order for every seed",
        "train/order.py",
        "step_rng(purpose, seed, epoch).integers",
        "step_rng(purpose, 0, epoch).integers",
        ("train/test_order.py",),
    ),
    Mutant(
        "an item beyond the end of an epoch",
        "train/order.py",
        "np.flatnonzero(items >= count)",
        "np.flatnonzero(items > count)",
        ("train/test_order.py",),
    ),
    Mutant(
        "columns that are never shuffled",
        "train/order.py",
        "column = (column + shift) % np.uint64(columns)",
        "column = column + np.uint64(0) * shift",
        ("train/test_order.py",),
    ),
    Mutant(
        "a network of two rounds",
        "train/order.py",
        "_ROUNDS = 12",
        "_ROUNDS = 2",
        ("train/test_order.py::test_items_are_spread_evenly_whatever_the_place",),
    ),
    Mutant(
        "workers that share positions",
        "train/order.py",
        "start = (turn * self.workers + self.rank) * self.batch_size",
        "start = (turn + self.rank) * self.batch_size",
        ("train/test_split.py::test_all_workers_together_compute_every_position_once",),
    ),
    Mutant(
        "an effective batch without the workers",
        "train/order.py",
        "return self.batch_size * self.accumulation * self.workers",
        "return self.batch_size * self.accumulation",
        ("train/test_split.py::test_all_workers_together_compute_every_position_once",),
    ),
    Mutant(
        "noise that forgets its block",
        "train/order.py",
        "seed_of(purpose, seed, part.step, block)",
        "seed_of(purpose, seed, part.step, 0)",
        ("train/test_split.py::test_noise_belongs_to_the_step_and_position",),
    ),
    Mutant(
        "a warm-up that begins at one",
        "train/optimizer.py",
        "return learning_rate * step / warmup_steps",
        "return learning_rate * (step + 1) / warmup_steps",
        ("train/test_schedules.py",),
    ),
    Mutant(
        "a cosine that begins before the warm-up ends",
        "train/optimizer.py",
        "math.cos(math.pi * (step - warmup_steps)",
        "math.cos(math.pi * step",
        ("train/test_schedules.py",),
    ),
    Mutant(
        "a decay that never ends",
        "train/optimizer.py",
        "if step >= last_step:\n        return 0.0",
        "if step > last_step + 4:\n        return 0.0",
        ("train/test_schedules.py",),
    ),
    Mutant(
        "a run that trains at rate 0 unnoticed",
        "train/optimizer.py",
        "if decay is not None and decay < steps:",
        "if decay is not None and decay < 0:",
        ("train/test_schedules.py",),
    ),
    Mutant(
        "a run that ends in its warm-up unnoticed",
        "train/optimizer.py",
        "if first_step < steps <= warmup:",
        "if first_step < steps < warmup - steps:",
        ("train/test_longer_runs.py::test_a_run_says_its_schedule_and_that_it_ends_in_its_warm_up",),
    ),
    Mutant(
        "a warm-up that does not shrink with the steps",
        "schemas/configs.py",
        "self.warmup_steps * steps // self.steps}",
        "self.warmup_steps}",
        ("train/test_schedules.py",),
    ),
    Mutant(
        "a decay that does not shrink with the steps",
        "schemas/configs.py",
        "max(1, self.decay_steps * steps // self.steps)",
        "self.decay_steps",
        ("train/test_schedules.py",),
    ),
    Mutant(
        "an effective batch shared out wrongly",
        "schemas/configs.py",
        "divmod(effective, workers * (passes or 1))",
        "divmod(effective, workers)",
        ("train/test_recipes.py::test_workers_and_passes_share_the_recipes_batch",),
    ),
    Mutant(
        "a resumed run with other rates in its past",
        "train/setup.py",
        "if rate(before, s) != rate(now, s)), None)",
        "if rate(before, s) < 0), None)",
        ("train/test_longer_runs.py::test_a_schedule_with_other_past_rates_is_refused",),
    ),
    Mutant(
        "a cool-down judged by the steps before it",
        "train/setup.py",
        'if begun.get("start") == "everything" else 0',
        'if begun.get("start") == "nothing" else 0',
        ("train/test_longer_runs.py::test_a_cool_down_is_past_any_warm_up",),
    ),
    Mutant(
        "the weight decay of the stage before",
        "train/optimizer.py",
        'group["weight_decay"] = decay',
        "pass",
        ("train/test_stages.py::test_a_cool_down_has_its_own_rate_and_decay_and_the_moments_of_before",),
    ),
    Mutant(
        "gradients that are never clipped",
        "train/optimizer.py",
        "if limit is not None:",
        "if limit is not None and limit > 1:",
        ("train/test_recipes.py::test_updates_are_those_computed_by_hand",),
    ),
    Mutant(
        "weight decay on all parameters",
        "models/optimizer_groups.py",
        "ParameterGroup(params=others, weight_decay=0.0)",
        "ParameterGroup(params=others, weight_decay=weight_decay)",
        ("train/test_recipes.py::test_updates_are_those_computed_by_hand",),
    ),
    Mutant(
        "no weight decay on convolutions",
        "models/optimizer_groups.py",
        "nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d",
        "nn.Linear",
        ("models/test_optimizer_groups.py",),
    ),
    Mutant(
        "smooth-L1 that jumps at beta",
        "models/blocks.py",
        "+ distance - 0.5 * beta\n",
        "+ distance - 0.25 * beta\n",
        ("models/test_losses.py",),
    ),
    Mutant(
        "the worst candidate wins",
        "models/selection.py",
        "return losses.argmin(dim=-1)",
        "return losses.argmax(dim=-1)",
        ("models/test_golden_world.py::test_best_of_many_loss_winners_and_gradients",),
    ),
    Mutant(
        "frames that others are decoded from are left out",
        "pipeline/decoding/probe.py",
        "referenced |= bool(data[start] >> 5)",
        "referenced |= False",
        ("pipeline/test_decode_synthetic.py",),
    ),
    Mutant(
        "lower temporal layers are left out",
        "pipeline/decoding/probe.py",
        "if facts.unreferenced and facts.layer == top",
        "if facts.unreferenced",
        ("pipeline/test_decode_synthetic.py",),
    ),
    Mutant(
        "candidates see the keys of later frames",
        "models/selection.py",
        "offset.masked_fill(hidden_keys[..., None], -torch.inf)",
        "offset.masked_fill(hidden_keys[..., None], 0.0)",
        ("models/test_best_of_many.py",),
    ),
    Mutant(
        "a selection that chooses worse is good enough",
        "train/world.py",
        'way == "float32" or losses[way] <= limit',
        'way == "float32" or losses[way] > limit',
        ("train/test_selection_choice.py",),
    ),
    Mutant(
        "a shortlist of the worst",
        "models/selection.py",
        "largest=False).indices  # (B, P, k)",
        "largest=True).indices  # (B, P, k)",
        ("models/test_best_of_many.py",),
    ),
    Mutant(
        "positions turned the other way",
        "models/blocks.py",
        "torch.stack((-second, first), dim=-2)",
        "torch.stack((second, -first), dim=-2)",
        ("models/test_golden_tokenizer.py::test_delta_tokens_of_whole_clips",),
    ),
    Mutant(
        "patch centres at their corners",
        "models/blocks.py",
        "torch.arange(n, device=device) + 0.5",
        "torch.arange(n, device=device)",
        ("models/test_golden_tokenizer.py::test_rope_angles",),
    ),
    Mutant(
        "periods of another range",
        "models/blocks.py",
        "_SLOWEST_EXPONENT, _FASTEST_EXPONENT = -2.0, 2.0",
        "_SLOWEST_EXPONENT, _FASTEST_EXPONENT = -1.0, 2.0",
        ("models/test_golden_world.py::test_best_of_many_loss_winners_and_gradients",),
    ),
    Mutant(
        "the last pair of a clip is never drawn",
        "train/data.py",
        "rng.integers(0, settings.frames - 1, size)",
        "rng.integers(0, settings.frames - 2, size)",
        ("train/test_train_data.py::test_pairs_cover_all_places_and_the_asked_share_is_black",),
    ),
    Mutant(
        "black in the place of the second frame",
        "train/data.py",
        "pairs[0, torch.from_numpy(choice.black)]",
        "pairs[1, torch.from_numpy(choice.black)]",
        ("train/test_train_data.py::test_a_pair_is_a_frame_and_the_next_one_of_the_drawn_clip",),
    ),
    Mutant(
        "black in the share that should not be",
        "train/data.py",
        "rng.random(size) < settings.black_first_fraction",
        "rng.random(size) >= settings.black_first_fraction",
        ("train/test_train_data.py::test_no_or_only_black_pairs",),
    ),
    Mutant(
        "times from the start of the video",
        "train/data.py",
        "sent(times - times[:, :1], device)",
        "sent(times, device)",
        ("train/test_train_data.py::test_delta_batches_hold_whole_clips_and_seconds_from_the_first_frame",),
    ),
    Mutant(
        "gradients summed over passes",
        "train/loop.py",
        "(loss / split.accumulation).backward()",
        "loss.backward()",
        ("train/test_split.py::test_two_passes_of_eight_learn_what_one_of_sixteen_does",),
    ),
    Mutant(
        "precision outside the fingerprint",
        "schemas/datasets.py",
        '"precision": self.precision,',
        '"precision": "float32",',
        ("pipeline/test_dataset.py::test_dtype_and_precision_determine_the_fingerprint",),
    ),
    Mutant(
        "the bfloat16 of older versions continued",
        "pipeline/jobs/offline.py",
        'if made == "bfloat16" and settings',
        'if made == "int4" and settings',
        ("pipeline/test_dataset.py::test_what_older_versions_made_in_bfloat16_is_read_and_never_continued",),
    ),
    Mutant(
        "a residual stream in bfloat16",
        "models/encoders.py",
        "self.encoder.embeddings(clips).float()",
        "self.encoder.embeddings(clips)",
        ("models/test_backbones.py::test_bfloat16_leaves_the_residual_stream_and_the_norms_in_float32",),
    ),
    Mutant(
        "rotation angles in bfloat16",
        "models/backbone.py",
        "isinstance(module, nn.Linear)",
        "isinstance(module, nn.Linear | nn.Conv2d)",
        ("pipeline/test_encoders.py::test_bfloat16_is_autocast_to_the_bit_with_its_weights_rounded_once",),
    ),
)

MUTANTS = NUMBERS + TRAINING


def copy_of_tree(folder: Path) -> Path:
    """The files that git knows or would add, as they are now, in ``folder``; golden numbers stay where they are."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    tree = folder / "tree"
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file() and not (ROOT / name).is_symlink():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tree / name)
    shared = ROOT.parent / "shared"
    if shared.exists():
        (folder / "shared").symlink_to(shared.resolve())
    # by hash, not by time: a mutant of the same length, made within the same second, must not be taken for the original
    compileall.compile_dir(
        tree / "src", quiet=1, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH
    )
    return tree


def _run_pytest(tree: Path, tests: Sequence[str], printed: Path) -> None:
    """What a child does: pytest in ``tree``, with what it prints in a file."""
    with printed.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(tree / "src")
    sys.dont_write_bytecode = True
    sys.path[:0] = [str(tree / "src")]
    import pytest

    options = (
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "--no-header",
        "-W",
        "ignore::pytest.PytestAssertRewriteWarning",
    )
    code = pytest.main([*options, *(f"tests/{each}" for each in tests)])
    sys.stdout.flush()
    os._exit(code)


def run_tests(tree: Path, tests: Sequence[str], limit_s: float = _LIMIT_S) -> tuple[int, str]:
    """pytest's exit code and the end of what it printed; 0 passed, 1 failed, anything else is neither."""
    printed = tree.parent / "printed.txt"
    child = _SERVER.Process(target=_run_pytest, args=(tree, tests, printed))
    child.start()
    child.join(limit_s)
    if child.exitcode is None:
        child.kill()
        child.join()
        return -1, f"no result within {limit_s:.0f} s"
    return child.exitcode, printed.read_text(encoding="utf-8", errors="replace")[-3000:]


def checked_source(mutant: Mutant) -> str:
    """The file that the mutant changes."""
    source = (ROOT / "src" / "deltacache" / mutant.file).read_text(encoding="utf-8")
    if source.count(mutant.old) != 1 or mutant.old == mutant.new:
        sys.exit(
            f"{mutant.name}: {mutant.old!r} is {source.count(mutant.old)} times in {mutant.file}, must be there once: "
            "move the mutant with the code"
        )
    return source


def judge(mutant: Mutant, tree: Path) -> tuple[str, str]:
    """``killed``, ``SURVIVED`` or ``BROKEN`` (no test ran to its end), and what pytest printed."""
    source = checked_source(mutant)
    place = tree / "src" / "deltacache" / mutant.file
    place.write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        code, text = run_tests(tree, mutant.tests)
    finally:
        place.write_text(source, encoding="utf-8")
    return {0: "SURVIVED", 1: "killed"}.get(code, "BROKEN"), text


def main() -> None:
    """Run the mutants that the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="run mutants whose name or file contains one of these")
    parser.add_argument("--jobs", type=int, default=1, help="copies of the tree that are tested side by side")
    asked = parser.parse_args()
    wanted = [
        each
        for each in MUTANTS
        if not asked.words or any(word in f"{each.name} {each.file}" for word in asked.words)
    ]
    for each in wanted:
        checked_source(each)
    _SERVER.set_forkserver_preload(list(_LIBRARIES))
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        trees: Queue[Path] = Queue()
        for number in range(asked.jobs):
            place = Path(folder) / str(number)
            place.mkdir()
            trees.put(copy_of_tree(place))

        tests = list(dict.fromkeys(test for each in wanted for test in each.tests))
        started = time.perf_counter()
        code, text = run_tests(trees.queue[0], tests, _LIMIT_S * len(tests))
        print(
            f"{time.perf_counter() - started:6.0f} s  {len(tests)} tests and files without a mutant",
            flush=True,
        )
        if code:
            sys.exit(f"without a mutant, these must pass:\n{text}")

        def judged(mutant: Mutant) -> str:
            tree, started = trees.get(), time.perf_counter()
            verdict, text = judge(mutant, tree)
            trees.put(tree)
            print(
                f"{verdict:9}{time.perf_counter() - started:6.0f} s  {mutant.file}: {mutant.name}", flush=True
            )
            if verdict == "BROKEN":
                print(text, flush=True)
            return verdict

        with ThreadPoolExecutor(asked.jobs) as pool:
            verdicts = list(pool.map(judged, wanted))
    print(
        f"{len(verdicts)} mutants: {verdicts.count('killed')} killed, {len(verdicts) - verdicts.count('killed')} not"
    )
    sys.exit(0 if set(verdicts) <= {"killed"} else 1)


if __name__ == "__main__":
    main()
