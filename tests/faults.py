"""Do the tests notice? Small faults, planted one at a time; a test must catch each.

    python -m tests.faults                      # all of them, about 20 minutes
    python -m tests.faults --only metrics       # those whose file or name contains the text
    python -m tests.faults --jobs 2             # two at a time, about 10 minutes on 2 cores

A green test says little until it has been seen red. Each fault here is a bug that somebody shipped
or could have: in the method, the kernels, the data's way, the scores, inference, the checkpoints.
Nothing is planted in this clone: the files are copied to a scratch folder first. There the tests
are run once without a fault, then with each of them.

To add a fault, add it to the list of its part: the file, what the bug is, the text before (which
must occur exactly once in the file), the text after, and the tests that must fail, as narrow as
possible. If no test fails, write that test.

A fault is caught when pytest ends with 1, tests failed. If the tests cannot even be collected the
fault is BROKEN: it shows nothing about them. pytest does not collect this file.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import Queue
from typing import NamedTuple

from support.progress import duration

ROOT = Path(__file__).parent.parent
TIMEOUT = 600  # seconds for the tests of one fault
VERDICTS = {0: "MISSED", 1: "caught"}  # pytest's exit codes


class Fault(NamedTuple):
    file: str
    name: str  # what is wrong
    before: str  # occurs exactly once in the file
    after: str
    tests: str  # node ids below tests/, as a shell would split them

    def __str__(self) -> str:
        return f"{self.file}: {self.name}"

    def planted(self, text: str) -> str:
        """The file's text with the fault; ends the program if it has no one place for it."""
        if (count := text.count(self.before)) != 1 or self.before == self.after:
            sys.exit(f"{self}: the text before occurs {count} times, not once")
        return text.replace(self.before, self.after)

    def node_ids(self) -> list[str]:
        return [f"tests/{test}" for test in shlex.split(self.tests)]


# --- The method: ctclm.py -------------------------------------------------------------------------

# fmt: off
METHOD = [
    Fault("ctclm.py", "Mix-FFN expands to three times the channels",
          "expansion: int = 4):\n        super().__init__()",
          "expansion: int = 3):\n        super().__init__()",
          "test_ctclm.py::test_the_encoders_have_the_published_sizes"),
    Fault("ctclm.py", "Conv-FFN expands to three times the channels",
          "expansion: int = 4):\n        hidden",
          "expansion: int = 3):\n        hidden",
          "test_ctclm.py::test_the_cnn_has_the_size_it_had"),
    Fault("ctclm.py", "the merged kernel has no identity",
          "        kernel[:, :, 5, 5] = 1\n",
          "",
          "test_ctclm.py::test_merged_convolution_equals_the_branches"),
    Fault("ctclm.py", "the merged kernel's branches lie in a corner",
          "F.pad(branch.weight, [(11 - size) // 2] * 4)",
          "F.pad(branch.weight, [0, 11 - size] * 2)",
          "test_ctclm.py::test_merged_convolution_equals_the_branches"),
    Fault("ctclm.py", "the CNN has batch normalisation",
          "return GroupNorm(8, channels, stream)",
          "return nn.BatchNorm2d(channels)",
          "test_ctclm.py::test_cnn_does_not_depend_on_its_neighbours_in_the_batch"),
    Fault("ctclm.py", "keys are reduced at the last stage too",
          "KEY_REDUCTION = (8, 4, 2, 1)",
          "KEY_REDUCTION = (8, 4, 2, 2)",
          "test_ctclm.py::test_the_encoders_have_the_published_sizes"),
    Fault("ctclm.py", "attention is scaled by all channels",
          "x = attention(q, k, v)  #",
          "x = attention(q, k, v, C**-0.5)  #",
          "test_ctclm.py::test_attention_layer_equals_multi_head_attention"),
    Fault("ctclm.py", "keys and values are swapped",
          "k, v = (x.transpose(1, 2) for x in kv.unbind(2))",
          "v, k = (x.transpose(1, 2) for x in kv.unbind(2))",
          "test_ctclm.py::test_attention_layer_equals_multi_head_attention"),
    Fault("ctclm.py", "attention is normalised after it is added",
          "x = x + self.attention(self.norm1(x), H, W)",
          "x = self.norm1(x + self.attention(x, H, W))",
          "test_ctclm.py::test_a_block_adds_to_its_input"),
    Fault("ctclm.py", "Mix-FFN has its nonlinearity before the convolution",
          "to_grid(self.expand(x), H, W)))\n        return self.reduce(F.gelu(x))",
          "to_grid(F.gelu(self.expand(x)), H, W)))\n        return self.reduce(x)",
          "test_ctclm.py::test_mix_ffn_as_published"),
    Fault("ctclm.py", "normalisation takes blue for red",
          "[123.675, 116.28, 103.53]",
          "[103.53, 116.28, 123.675]",
          "test_ctclm.py::test_normalisation_is_inside_and_not_in_the_state"),
    Fault("kernels/upsample.py", "the head aligns corners",
          'mode="bilinear", align_corners=False',
          'mode="bilinear", align_corners=True',
          "test_ctclm.py::test_head_equals_the_published_order"),
    Fault("ctclm.py", "the head is normalised after its nonlinearity",
          "F.relu(self.norm(sum(levels)))",
          "self.norm(F.relu(sum(levels)))",
          "test_ctclm.py::test_head_equals_the_published_order"),
    Fault("ctclm.py", "the projector does not normalise",
          "nn.BatchNorm2d(shared_dim, affine=False, track_running_stats=False)",
          "nn.Identity()",
          "test_ctclm.py::test_every_dimension_of_the_shared_space_has_variance_1"),
    Fault("ctclm.py", "both branches share one projector",
          "for p, x in zip(self.transformer_projectors, output.transformer_features",
          "for p, x in zip(self.cnn_projectors, output.transformer_features",
          "test_ctclm.py::test_everything_is_trained"),
    Fault("ctclm.py", "the alignment moves its teacher",
          "(student * teacher.detach())",
          "(student * teacher)",
          "test_ctclm.py::test_each_distance_moves_one_branch"),
    Fault("ctclm.py", "the regional alignment moves the better branch",
          "cnn_is_better * transformer_moves + (1 - cnn_is_better) * cnn_moves",
          "cnn_is_better * cnn_moves + (1 - cnn_is_better) * transformer_moves",
          "test_ctclm.py::test_late_stages_follow_the_branch_that_is_right"),
    Fault("ctclm.py", "the gap has the wrong sign",
          "return valid, (l_t - l_c)[:, None]",
          "return valid, (l_c - l_t)[:, None]",
          "test_ctclm.py::test_late_stages_follow_the_branch_that_is_right"),
    Fault("ctclm.py", "the stages of the two alignments",
          "                if s < 2:\n",
          "                if s < 3:\n",
          "test_ctclm.py::test_early_stages_are_aligned_both_ways"),
    Fault("ctclm.py", "ignored pixels are aligned",
          "valid = F.adaptive_avg_pool2d((labels != ignored)[:, None].float(), size)",
          "valid = F.adaptive_avg_pool2d((labels == labels)[:, None].float(), size)",
          "test_ctclm.py::test_only_labelled_positions_take_part"),
    Fault("ctclm.py", "the alignment is divided by all positions",
          "add_up((values * counts).sum()) / add_up(counts.sum()).clamp(min=1)",
          "(values * counts).mean()",
          "test_ctclm.py::test_ignored_images_do_not_reach_the_alignment"),
    Fault("ctclm.py", "the covariance penalty has the diagonal",
          "off_diagonal = covariance - torch.diag(torch.diagonal(covariance))",
          "off_diagonal = covariance",
          "test_ctclm.py::test_covariance_penalty_by_hand"),
    Fault("ctclm.py", "the covariance is not centred",
          "centred = (rows - add_up(w.T @ rows) / n) * w",
          "centred = rows * w",
          "test_ctclm.py::test_covariance_penalty_by_hand"),
    Fault("ctclm.py", "the decorrelation is a sum, not a mean",
          "decorrelation = decorrelation + penalty / 8",
          "decorrelation = decorrelation + penalty",
          "test_ctclm.py::test_terms_of_the_shared_space_are_means"),
    Fault("ctclm.py", "the weights of the alignments are swapped",
          "c.align_weight * align + c.region_weight * region",
          "c.region_weight * align + c.align_weight * region",
          "test_ctclm.py::test_total_is_the_weighted_sum"),
    Fault("ctclm.py", "the decorrelation is ramped",
          "supervised + ramp * collaboration + c.decorrelation_weight * decorrelation",
          "supervised + ramp * (collaboration + c.decorrelation_weight * decorrelation)",
          "test_ctclm.py::test_total_is_the_weighted_sum"),
    Fault("ctclm.py", "the ramp's exponent is not squared",
          "math.exp(-5 * (1 - t) ** 2)",
          "math.exp(-5 * (1 - t))",
          "test_ctclm.py::test_ramp"),
]
# fmt: on

# --- The loop: train.py ---------------------------------------------------------------------------

# fmt: off
LOOP = [
    Fault("train.py", "gradients are not clipped",
          "norms = self.clip_gradients()",
          "norms = torch.ones(3)",
          "test_train.py::test_a_step_clips_before_it_updates"),
    Fault("train.py", "gradients are clipped together",
          'parts = self.model.branches | {"projectors": self.model.projectors}',
          'parts = {"model": self.model}',
          "test_train.py::test_gradients_are_clipped_for_each_part_by_itself"),
    Fault("support/gradients.py", "an infinite gradient is clipped to zero",
          "if not math.isfinite(norm):",
          "if norm < 0:",
          "test_train.py::test_a_gradient_that_is_not_finite_stops_the_run"),
    Fault("train.py", "an infinite gradient reaches the weights",
          "self.optimizer.found_inf = skip if",
          "self.optimizer.found_inf = None if",
          "test_train.py::test_a_gradient_that_is_not_finite_stops_the_run"),
    Fault("train.py", "a step ignores the ramp",
          "self.model.objective(output, labels, ramp)",
          "self.model.objective(output, labels)",
          "test_train.py::test_a_step_uses_the_learning_rate_and_the_ramp_of_its_number"),
    Fault("train.py", "gradients add up over steps",
          "        self.optimizer.zero_grad(set_to_none=True)\n",
          "",
          "test_train.py::test_a_step_forgets_the_gradients_of_the_last"),
    Fault("train.py", "the learning rate has no warm-up",
          "        if self.step < warm_up:\n",
          "        if False:\n",
          "test_train.py::test_learning_rate"),
    Fault("train.py", "the optimiser does not follow the learning rate",
          'group["lr"] = lr',
          'group["lr"] = self.config.lr',
          "test_train.py::test_a_step_uses_the_learning_rate_and_the_ramp_of_its_number"),
    Fault("train.py", "biases and norms decay",
          '{"params": others, "weight_decay": 0.0}',
          '{"params": others, "weight_decay": 0.01}',
          "test_train.py::test_weight_decay_is_for_matrices_only"),
    Fault("train.py", "the best checkpoint is the CNN's best",
          "deployed, *others = scores",
          "*others, deployed = scores",
          "test_train.py::test_best_is_the_best_validation"),
    Fault("train.py", "the best checkpoint is the last",
          'is_best = scores[deployed]["miou"] > self.best["miou"]',
          "is_best = True",
          "test_train.py::test_best_is_the_best_validation"),
    Fault("train.py", "validation is in training mode",
          "        self.model.eval()\n        scores = {}\n",
          "        scores = {}\n",
          "test_train.py::test_validation_is_in_evaluation_mode_and_training_is_not"),
    Fault("train.py", "training goes on in evaluation mode",
          "        self.model.train()\n        return scores\n",
          "        return scores\n",
          "test_train.py::test_validation_is_in_evaluation_mode_and_training_is_not"),
    Fault("support/resume.py", "resuming forgets the optimiser",
          '    run.optimizer.load_state_dict(state["optimizer"])\n',
          "",
          "support/test_resume.py::test_a_resumed_run_ends_in_the_same_bits"),
    Fault("support/resume.py", "resuming forgets the step",
          'run.step, run.log, run.best = state["step"], state["log"], state["best"]',
          'run.log, run.best = state["log"], state["best"]',
          "support/test_resume.py::test_a_resumed_run_ends_in_the_same_bits"),
    Fault("support/resume.py", "resuming forgets the steps since the last report",
          '    run.history = [losses.to(run.device) for losses in state["history"]]\n',
          "",
          "support/test_resume.py::test_a_resumed_run_ends_in_the_same_bits"),
    Fault("support/resume.py", "resuming forgets the best validation",
          'run.step, run.log, run.best = state["step"], state["log"], state["best"]',
          'run.step, run.log = state["step"], state["log"]',
          "test_train.py::test_a_resumed_run_remembers_its_best"),
    Fault("support/resume.py", "--resume takes the defaults for what is not said",
          "given = cli.from_plain(config_class, before, f\"{out}: was started\") | given",
          "given = dict(given)",
          "support/test_resume.py::test_resume_alone_has_the_options_of_the_run"),
    Fault("support/resume.py", "any number of processes goes on",
          'state["ranks"] == ranks,',
          "True,",
          "support/test_resume.py::test_another_number_of_processes_is_refused"),
    Fault("support/resume.py", "a run goes on with fewer steps than it has done",
          "cli.require(steps >= step,",
          "cli.require(True,",
          "support/test_resume.py::test_more_steps_and_their_schedule"),
    Fault("train.py", "saves wait for a validation",
          "if validate or stopped or now - saved > SECONDS_PER_SAVE:",
          "if validate or stopped:",
          "support/test_resume.py::test_a_resumed_run_ends_in_the_same_bits"),
    Fault("support/progress.py", "a compilation counts as a step",
          "            self.slow -= 1\n",
          "            self.counted, self.counted_seconds = 1, seconds\n",
          "support/test_progress.py::test_the_time_left_is_right_after_the_first_tenth"),
    Fault("support/progress.py", "the time left has no validations",
          "self.steps * step + self.validations * validation",
          "self.steps * step",
          "support/test_progress.py::test_the_time_left_is_right_after_the_first_tenth"),
    Fault("support/memory.py", "a tensor that is kept twice is counted twice",
          "kept[storage.data_ptr()] = storage.nbytes()",
          "kept[len(kept)] = storage.nbytes()",
          "support/test_memory.py::test_what_is_kept_is_counted_once_and_without_weights"),
    Fault("support/memory.py", "the parts of a batch are not the batch",
          "images.chunk(parts)]",
          "images.chunk(parts)[:1] * parts]",
          "support/test_memory.py::test_a_batch_in_parts_has_the_gradients_of_the_whole"),
    Fault("support/memory.py", "a batch in parts keeps everything",
          "[computed_again(encode, part, **options) for",
          "[encode(part) for",
          "support/test_memory.py::test_a_batch_in_parts_has_the_gradients_of_the_whole"),
    Fault("support/cli.py", "resuming does not compare the options",
          "before[key] == value,",
          "before[key] is not None,",
          "test_train.py::test_resuming_with_other_options_is_refused"),
    Fault("train.py", "the seed does not reach the weights",
          "torch.manual_seed(config.seed)",
          "torch.manual_seed(0)",
          "test_train.py::test_the_seed_reaches_weights_and_windows"),
    Fault("train.py", "the seed does not reach the windows",
          "share_of_batch(config.batch), config.seed, ranks.rank)",
          "share_of_batch(config.batch), 0, ranks.rank)",
          "test_train.py::test_the_seed_reaches_weights_and_windows"),
    Fault("support/audit.py", "a validation tile is trained on",
          "    if both - {None}:",
          "    if False:",
          "test_train.py::test_no_tile_is_in_both_sets"),
]
# fmt: on

# --- The kernels ----------------------------------------------------------------------------------

ATTENTION, ATTENTION_KERNELS = "kernels/attention.py", "kernels/attention_triton.py"
ATTENTION_TEST = "kernels/test_attention.py::"
ONE_CHUNK, SEVERAL_CHUNKS = (  # of keys; and several slices of queries
    f"{ATTENTION_TEST}test_kernels_are_no_worse[{shape}-torch.float32]"
    for shape in ("2-3-63-16-16", "1-1-40-40-128")
)
UPSAMPLING = "kernels/upsample.py"
LAYER, LAYER_TEST = "kernels/norm.py", "kernels/test_norm.py::"
GROUP, GROUP_TEST = "kernels/group_norm.py", "kernels/test_group_norm.py::"
SPECIFICATION = "kernels/distill.py"
LOSS = "kernels/test_distill.py"
EVERY_TRANSFER = "kernels/test_distill.py::test_every_transfer_is_honoured"
ON_CPU, ON_GPU = (f"{EVERY_TRANSFER}[selective-2.0-{path}]" for path in ("pytorch", "triton"))
ROWS = "kernels/distill_rows.py"
TRITON = "kernels/distill_triton.py"
STATIC = "experiments/test_static.py"

# fmt: off
KERNELS = [
    Fault(ATTENTION, "a scale of 0 is taken for none",
          "scale = q.shape[-1] ** -0.5 if scale is None else float(scale)",
          "scale = float(scale or q.shape[-1] ** -0.5)",
          f"{ATTENTION_TEST}test_scale_is_honoured"),
    Fault(ATTENTION, "float32 without a gradient runs on our exact products",
          "q.dtype == torch.float32 and not gradient",
          "False",
          f"{ATTENTION_TEST}test_float32_without_gradient_is_left_to_pytorch_on_a_gpu"),
    Fault(ATTENTION_KERNELS, "softmax without its maximum",
          "new_top = tl.maximum(top, tl.max(s, 1) * scale_2)",
          "new_top = tl.zeros_like(top)",
          f"{ATTENTION_TEST}test_kernels_with_large_scores"),
    Fault(ATTENTION_KERNELS, "a new maximum does not rescale the output",
          "    out = out * shrink[:, None]\n",
          "",
          SEVERAL_CHUNKS),
    Fault(ATTENTION_KERNELS, "keys beyond the last have a weight",
          'return tl.where(m[None, :] < M, s, float("-inf")) if RAGGED else s',
          "return s",
          SEVERAL_CHUNKS),
    Fault(ATTENTION_KERNELS, "a negative scale takes the smallest score for the largest",
          "return triton_forward(-q, k, v, -scale)",
          "pass",
          f"{ATTENTION_TEST}test_kernels_honour_the_scale"),
    Fault(ATTENTION_KERNELS, "keys beyond the last are no number at a scale of 0",
          "return max(scale * LOG2_E, 1e-30)",
          "return scale * LOG2_E",
          f"{ATTENTION_TEST}test_kernels_honour_the_scale"),
    Fault(ATTENTION_KERNELS, "a program's tiles overlap, forward",
          "v_row_stride, M, D)\n    for t in tl.range(TILES, disable_licm=True):\n"
          "        n = (block * TILES + t) * QUERIES",
          "v_row_stride, M, D)\n    for t in tl.range(TILES, disable_licm=True):\n"
          "        n = (block + t) * QUERIES",
          f"{ATTENTION_TEST}test_kernels_with_several_tiles_to_a_program"),
    Fault(ATTENTION_KERNELS, "a program's tiles overlap, gradients of keys",
          "n = (part * TILES + t) * QUERIES",
          "n = (part + t) * QUERIES",
          f"{ATTENTION_TEST}test_kernels_with_several_tiles_to_a_program"),
    Fault(ATTENTION_KERNELS, "values are read with the keys' strides",
          "strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])\n",
          "strides = (*q.stride()[:3], *k.stride()[:3], *k.stride()[:3])\n",
          f"{ATTENTION_TEST}test_kernels_with_any_strides"),
    Fault(ATTENTION_KERNELS, "a last dimension that is not contiguous is read as if it were",
          "return x if x.stride(3) == 1 else x.contiguous()",
          "return x",
          f"{ATTENTION_TEST}test_kernels_with_any_strides"),
    Fault(ATTENTION_KERNELS, "dq without the scale", "dq * scale,", "dq,", SEVERAL_CHUNKS),
    Fault(ATTENTION_KERNELS, "dk without the scale", "sum_dk * scale,", "sum_dk,", SEVERAL_CHUNKS),
    Fault(ATTENTION_KERNELS, "dk without sum p dp",
          "ds = (p * (dp - delta[:, None])).to(queries.dtype)",
          "ds = (p * dp).to(queries.dtype)",
          ONE_CHUNK),
    Fault(ATTENTION_KERNELS, "dq without sum p dp, its weights in registers",
          "(delta * weight)[:, None]",
          "(0 * weight)[:, None]",
          ONE_CHUNK),
    Fault(ATTENTION_KERNELS, "dq without sum p dp, keys read twice",
          "ds = p * (dp - delta[:, None])\n",
          "ds = p * dp\n",
          f"{ATTENTION_TEST}test_kernels_with_the_blocks_as_shipped[70-300-16-torch.float32]"),
    Fault(ATTENTION_KERNELS, "weights in registers keep an older maximum",
          "weight = tl.exp2(tops[c] - top) / total",
          "weight = 1 / total",
          f"{ATTENTION_TEST}test_slices_of_the_queries"),
    Fault(ATTENTION_KERNELS, "dk and dv have the first slice of queries alone",
          "inside = (part < slices)",
          "inside = (part < 1)",
          f"{ATTENTION_TEST}test_slices_of_the_queries"),
    Fault(LAYER, "padding counts as channels",
          "    if C < WIDTH:\n        x = tl.where(tl.arange(0, WIDTH)[None, :] < C, x, 0.0)\n",
          "",
          f"{LAYER_TEST}test_kernels_are_no_worse[63-33-torch.float32]"),
    Fault(LAYER, "variance as a mean of squares minus a square of means",
          "    x -= (tl.sum(x, 1) / C)[:, None]\n",
          "    mean = tl.sum(x, 1) / C\n    lost = tl.sum(x * x, 1) / C - mean * mean\n"
          "    x -= mean[:, None]\n    eps += lost - tl.sum(x * x, 1) / C\n",
          f"{LAYER_TEST}test_kernels_with_a_large_mean[32]"),
    Fault(LAYER, "dx without mean(g z)",
          " - z * (tl.sum(g * z, 1) / C)[:, None]",
          "",
          f"{LAYER_TEST}test_kernels_are_no_worse[63-33-torch.float32]"),
    Fault(LAYER, "a program's tiles overlap, backward",
          "first = (program + t * programs) * ROWS",
          "first = (program + t) * ROWS",
          f"{LAYER_TEST}test_kernels_with_several_tiles_to_a_program"),
    Fault(LAYER, "the result ignores the dtype asked for",
          "y = torch.empty_like(x, dtype=dtype)",
          "y = torch.empty_like(x)",
          f"{LAYER_TEST}test_kernels_with_mixed_dtypes"),
    Fault(LAYER, "any layout is read as if it were contiguous",
          "x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()",
          "",
          f"{LAYER_TEST}test_kernels_with_any_strides"),
    Fault(GROUP, "squares are not relative to a mean",
          "x = load_rows(x_ptr, first, P, C, ROWS, WIDTH) - shift[None, :]",
          "shift *= 0\n        x = load_rows(x_ptr, first, P, C, ROWS, WIDTH)",
          f"{GROUP_TEST}test_kernels_with_a_large_mean"),
    Fault(GROUP, "the last chunk counts as a whole one",
          "mean * tl.minimum(P - (start + k) * pixels, pixels)",
          "mean * pixels",
          f"{GROUP_TEST}test_kernels_with_several_chunks_and_tiles"),
    Fault(GROUP, "channels' means differ without adding to the variance",
          "        squares += tl.where(here, distance, 0.0)\n",
          "",
          f"{GROUP_TEST}test_kernels_with_a_large_mean"),
    Fault(GROUP, "dx without mean(g)",
          "(g - mean_g[None, :] - z",
          "(g - z",
          f"{GROUP_TEST}test_kernels_are_no_worse[1-24-2-13-7-torch.float32]"),
    Fault(GROUP, "a group's means without the weight",
          "tl.sum(sums * weight, 1)",
          "tl.sum(sums, 1)",
          f"{GROUP_TEST}test_kernels_are_no_worse[1-24-2-13-7-torch.float32]"),
    Fault("kernels/choose.py", "any layout is read as channels-last",
          "    return x.contiguous(memory_format=torch.channels_last)",
          "    return x",
          f"{GROUP_TEST}test_kernels_with_any_strides"),
    Fault("ctclm.py", "streams are rounded under autocast",
          "low = torch.is_autocast_enabled(device) and not stream",
          "low = torch.is_autocast_enabled(device)",
          f"{LAYER_TEST}test_in_the_model_only_the_streams_stay_in_float32"),
    Fault(SPECIFICATION, "r and 1 - r are swapped",
          '"selective": ((0, 1), (1, -1))',
          '"selective": ((1, -1), (0, 1))',
          f"{LOSS}::test_by_hand"),
    Fault(SPECIFICATION, "the gate believes the branch that is wrong",
          "r = torch.sigmoid((l_t - l_c) / kappa).detach()",
          "r = torch.sigmoid((l_c - l_t) / kappa).detach()",
          f"{LOSS}::test_by_hand"),
    Fault(SPECIFICATION, "the gate is not detached",
          "r = torch.sigmoid((l_t - l_c) / kappa).detach()",
          "r = torch.sigmoid((l_t - l_c) / kappa)",
          f"{LOSS}::test_the_gate_carries_no_gradient"),
    Fault(SPECIFICATION, "the gate of the pictures has the wrong sign",
          "torch.sigmoid((l_t - l_c) / kappa).masked_fill",
          "torch.sigmoid((l_c - l_t) / kappa).masked_fill",
          f"{LOSS}::test_mean_of_the_gate_per_pixel_is_the_gate_of_the_loss"),
    Fault(SPECIFICATION, "the CNN learns while it teaches",
          "kl_divergence(teacher=log_p_c.detach(), student=log_p_t)",
          "kl_divergence(teacher=log_p_c, student=log_p_t)",
          f"{LOSS}::test_only_the_student_moves"),
    Fault(SPECIFICATION, "the Transformer learns while it teaches",
          "kl_divergence(teacher=log_p_t.detach(), student=log_p_c)",
          "kl_divergence(teacher=log_p_t, student=log_p_c)",
          f"{LOSS}::test_only_the_student_moves"),
    Fault(SPECIFICATION, "the divergence has its sides swapped",
          "return (teacher.exp() * (teacher - student)).sum(dim=1)",
          "return (student.exp() * (student - teacher)).sum(dim=1)",
          f"{LOSS}::test_direction_of_the_divergence"),
    Fault(SPECIFICATION, "no T^2",
          "temperature**2 * weight_ct * cnn_teaches",
          "weight_ct * cnn_teaches",
          ON_CPU),
    Fault(SPECIFICATION, "the divisor counts ignored pixels",
          "count = valid.sum().clamp(min=1)",
          "count = max(1, valid.numel())",
          f"{LOSS}::test_ignored_pixels_change_nothing"),
    Fault(SPECIFICATION, "ignored pixels add to the sums",
          "torch.where(valid, m, 0).sum()",
          "m.sum()",
          f"{LOSS}::test_ignored_pixels_change_nothing"),
    Fault(UPSAMPLING, "logits are upsampled with aligned corners",
          'mode="bilinear", align_corners=False',
          'mode="bilinear", align_corners=True',
          ON_CPU),
    Fault(SPECIFICATION, "without a valid pixel the loss is NaN",
          "(sums[:5] / sums[5].clamp(min=1))",
          "(sums[:5] / sums[5])",
          f"{LOSS}::test_without_a_valid_pixel_all_is_zero"),
    Fault(ROWS, "a chunk does not reach the rows beside it",
          "reach = slice(max(first - 1, 0), last + 1)",
          "reach = slice(first, last + 1)",
          ON_CPU),
    Fault(UPSAMPLING, "the matrix aligns corners",
          'mode="linear", align_corners=False)[0]',
          'mode="linear", align_corners=True)[0]',
          f"{LOSS}::test_cross_entropies_are_pytorchs"),
    Fault(UPSAMPLING, "the matrix aligns corners (upsampling by itself)",
          'mode="linear", align_corners=False)[0]',
          'mode="linear", align_corners=True)[0]',
          "kernels/test_upsample.py::test_values_and_gradients"),
    Fault(UPSAMPLING, "rows are interpolated as columns",
          "for n in ((h, H), (w, W)))",
          "for n in ((w, W), (h, H)))",
          "kernels/test_upsample.py::test_values_and_gradients"),
    Fault(UPSAMPLING, "autocast rounds what is upsampled",
          "with torch.autocast(x.device.type, enabled=False):",
          "with torch.autocast(x.device.type):",
          "kernels/test_upsample.py::test_autocast_leaves_the_dtype"),
    Fault(ROWS, "no T^2", "    sums[2:4] *= temperature**2\n", "", ON_CPU),
    Fault(ROWS, "the transfer's gradient without T",
          "    gradients[1] *= temperature\n",
          "",
          ON_CPU),
    Fault(ROWS, "the denominator at temperature 1",
          "lse = softmax_and_lse(z.div_(temperature), out=q)",
          "softmax_and_lse(z.div_(temperature), out=q)",
          ON_CPU),
    Fault(ROWS, "the Transformer moves away from its teacher",
          "torch.mul(of_cnn, -weight_ct, out=of_transformer)",
          "torch.mul(of_cnn, weight_ct, out=of_transformer)",
          ON_CPU),
    Fault(ROWS, "ignored pixels have a gradient",
          "p.mul_(m).scatter_add_(2, target, -m.expand_as(target))",
          "p.scatter_add_(2, target, -torch.ones_like(m).expand_as(target))",
          f"{LOSS}::test_without_a_valid_pixel_all_is_zero"),
    Fault(ROWS, "each branch gets the other's upstream gradient",
          "scale = upstream.view(2, 2, 1, 1, 1, 1).flip(1)",
          "scale = upstream.view(2, 2, 1, 1, 1, 1)",
          ON_CPU),
    Fault(TRITON, "pixels lie at quarters, not at eighths",
          "tl.where(j >= n, 0.0, (p + 0.5) / 4)",
          "tl.where(j >= n, 0.0, p / 4)",
          ON_GPU),
    Fault(TRITON, "the first cell shares its gradient with a logit outside",
          "tl.where(j == 0, 1.0, tl.where(j >= n, 0.0, (p + 0.5) / 4))",
          "tl.where(j >= n, 0.0, (p + 0.5) / 4)",
          ON_GPU),
    Fault(TRITON, "the lower rows' gradient is not carried on",
          "upper, lower = lower, zeros(LANES, K)",
          "upper, lower = zeros(LANES, K), zeros(LANES, K)",
          ON_GPU),
    Fault(TRITON, "a cell adds its own share, not its neighbour's",
          "(tl.arange(0, CELLS) + 1) % CELLS",
          "tl.arange(0, CELLS)",
          ON_GPU),
    Fault(TRITON, "the last dual row is nobody's",
          "triton.cdiv(h + 1, rows), B)",
          "triton.cdiv(h, rows), B)",
          f"{LOSS}::test_logits_of_any_layout[triton]"),
    Fault(TRITON, "the label is compared with the next class",
          "value = tl.where(y == k, z[k], value)",
          "value = tl.where(y == k + 1, z[k], value)",
          ON_GPU),
    Fault(TRITON, "a label that is no class gives 0",
          'value = tl.full(y.shape, float("nan"), tl.float32)',
          "value = tl.zeros(y.shape, tl.float32)",
          f"{LOSS}::test_a_label_that_is_no_class_gives_nan"),
    Fault(TRITON, "the cross entropy's gradient without its one-hot",
          "g = p_s * e_s[k] - tl.where(y == k, ce, 0) +",
          "g = p_s * e_s[k] +",
          ON_GPU),
    Fault(TRITON, "the transfer's gradient without T",
          "    scale[2:] *= temperature\n",
          "",
          ON_GPU),
    Fault(TRITON, "T where T^2 belongs",
          "T * T * weight_tc * transformer_teaches",
          "T * weight_tc * transformer_teaches",
          ON_GPU),
    Fault(TRITON, "the CNN's gate in its gradient has the wrong sign",
          "                ce_gap = -ce_gap\n",
          "                ce_gap = ce_gap\n",
          ON_GPU),
    Fault(TRITON, "the weights of the two students are swapped",
          "scale[1::2].contiguous(), weights[1], True)",
          "scale[1::2].contiguous(), weights[0], True)",
          ON_GPU),
    Fault(TRITON, "a kernel is not the one that was compiled",
          "value = tl.where(y == k, z[k], value)",
          "value = tl.where(k == y, z[k], value)",
          f"{STATIC}::test_every_build_is_there_and_of_todays_kernels"),
    Fault("experiments/static.py", "a hash forgets the kernel",
          "[build.kernel.fn.__name__, sources,",
          "[build.kernel.fn.__name__,",
          f"{STATIC}::test_a_hash_is_of_what_the_compiler_is_given"),
    Fault("experiments/static.py", "a build whose kernel changed is taken over",
          "if found[i] is None or found[i].source != source_hash(build)",
          "if found[i] is None",
          f"{STATIC}::test_only_what_changed_is_compiled_again"),
]
# fmt: on

# --- The data -------------------------------------------------------------------------------------

WINDOWS = "test_data_windows.py"

# fmt: off
DATA = [
    Fault("data.py", "every step has the same windows",
          "counter=[0, 0, k, step]",
          "counter=[0, 0, k, 0]",
          f"{WINDOWS}::test_windows_of_a_batch_and_of_steps_differ"),
    Fault("data.py", "all windows of a batch are the same",
          "counter=[0, 0, k, step]",
          "counter=[0, 0, 0, step]",
          f"{WINDOWS}::test_windows_of_a_batch_and_of_steps_differ"),
    Fault("data.py", "every seed has the same windows",
          "key=[self.seed, self.rank]",
          "key=[0, self.rank]",
          f"{WINDOWS}::test_seed_and_rank_change_the_windows"),
    Fault("data.py", "every rank has the same windows",
          "key=[self.seed, self.rank]",
          "key=[self.seed, 0]",
          f"{WINDOWS}::test_seed_and_rank_change_the_windows"),
    Fault("data.py", "scenes are drawn whatever their size",
          "rng.choice(len(self.area_shares), p=self.area_shares)",
          "rng.choice(len(self.area_shares))",
          f"{WINDOWS}::test_scenes_are_drawn_by_their_area"),
    Fault("data.py", "labels are resized bilinearly",
          "resize(size, Image.Resampling.NEAREST)",
          "resize(size, bilinear)",
          f"{WINDOWS}::test_a_window_has_no_class_that_its_scene_has_not"),
    Fault("data.py", "the image is flipped and the label is not",
          "return (image[:, ::-1], label[:, ::-1]) if flip",
          "return (image[:, ::-1], label) if flip",
          f"{WINDOWS}::test_image_and_label_stay_together"),
    Fault("data.py", "the image is turned and the label is not",
          "np.rot90(image, quarter_turns), np.rot90(label, quarter_turns)",
          "np.rot90(image, quarter_turns), label",
          f"{WINDOWS}::test_image_and_label_stay_together"),
    Fault("data.py", "only half turns",
          "quarter_turns, flip = rng.integers(4), rng.integers(2)",
          "quarter_turns, flip = 2 * rng.integers(2), rng.integers(2)",
          f"{WINDOWS}::test_all_eight_orientations_occur"),
    Fault("data.py", "padding is class 0",
          "constant_values=IGNORE)",
          "constant_values=0)",
          f"{WINDOWS}::test_small_scenes_are_padded_and_the_padding_is_ignored"),
    Fault("data.py", "labels are jittered like images",
          "            image = photometric_jitter(image, rng)\n",
          "            image = photometric_jitter(image, rng)\n"
          "            label = photometric_jitter(label[..., None], rng)[..., 0]\n",
          f"{WINDOWS}::test_a_window_has_no_class_that_its_scene_has_not"),
    Fault("data.py", "light changes without augmentation",
          "        if self.augment:\n            image = photometric_jitter",
          "        if True:\n            image = photometric_jitter",
          f"{WINDOWS}::test_without_augmentation_a_window_is_a_turned_piece_of_its_scene"),
    Fault("data.py", "contrast is about mid-grey",
          "mean = [image[..., band].sum() / image[..., band].size for band in range(bands)]",
          "mean = [127.5 for band in range(bands)]",
          f"{WINDOWS}::test_jitter_is_one_contrast_about_each_bands_mean_and_an_exposure_per_band"),
    Fault("data.py", "a pixel at the first of its square is drawn from the square before",
          'np.searchsorted(self.cumulative, pixel, side="right")',
          'np.searchsorted(self.cumulative, pixel, side="left")',
          f"{WINDOWS}::test_the_only_pixel_of_a_square_is_drawn_too"),
    Fault("data.py", "the pixel of a rare class need not be in its window",
          "random_crop(self.scenes[scene], side, rng, point)",
          "random_crop(self.scenes[scene], side, rng)",
          f"{WINDOWS}::test_rare_windows_show_cars"),
    Fault("support/decode.py", "colours of no class become class 0",
          "rows[rows == UNKNOWN] = IGNORE",
          "rows[rows == UNKNOWN] = 0",
          "test_data.py::test_what_was_allowed_once_is_not_allowed_for_ever"),
    Fault("support/decode.py", "a cached label does not depend on its classes",
          "how = repr((self.classes, self.encoding, self.max_unknown))",
          'how = "label"',
          "test_data.py::test_other_classes_are_other_labels"),
    Fault("support/decode.py", "a cached label may have another size than its image",
          "        check_size(pixels.shape, image.shape, path, image_path)\n",
          "",
          "test_data.py::test_a_cached_label_must_still_fit_its_image"),
    Fault("support/labels.py", "a corner of no class is class 0",
          "table = np.full(8, UNKNOWN, np.uint8)",
          "table = np.zeros(8, np.uint8)",
          "support/test_labels.py::test_colours_of_no_class"),
    Fault("support/labels.py", "the threshold is 200",
          "bright = (rgb > 127)",
          "bright = (rgb > 200)",
          "support/test_labels.py::test_scattered_colours_decode"),
    Fault("support/labels.py", "colours between two corners have a class",
          "    label[far_from_corners(rgb, FAR)] = UNKNOWN\n",
          "",
          "support/test_labels.py::test_colours_of_no_class"),
    Fault("support/labels.py", "a photograph passes for a label",
          "if self.blurred > max(MAX_BLURRED, max_unknown) * pixels:",
          "if False:",
          "support/test_labels.py::test_an_overlay_or_a_photograph_is_refused"),
    Fault("support/labels.py", "indices keep the publisher's first",
          "            table[value] = k\n",
          "            table[value] = value\n",
          "support/test_labels.py::test_indices"),
    Fault("support/labels.py", "ignored pixels are counted as class 0",
          "bin_of = np.full(256, K + 1, np.int32)",
          "bin_of = np.zeros(256, np.int32)",
          "support/test_labels.py::test_cells_count_every_pixel_once"),
    Fault("support/layouts.py", "LoveDA's no-data is a class",
          "values = tuple(range(1, len(LOVEDA.names) + 1))",
          "values = tuple(range(len(LOVEDA.names)))",
          "test_data.py::test_loveda_no_data_is_ignored_and_classes_start_at_zero"),
    Fault("support/layouts.py", "a validation tile is in the training split",
          '"train": "2_10 2_12',
          '"train": "2_10 2_11 2_12',
          "support/test_layouts.py::test_potsdam_splits_are_the_publishers"),
    Fault("support/layouts.py",
          "Potsdam's test set has a tile of the training set instead of its own",
          '7_12",\n    "val": "2_11 3_12 4_10 5_12 6_12 7_8",\n    "test": "2_13',
          '2_13",\n    "val": "2_11 3_12 4_10 5_12 6_12 7_8",\n    "test": "7_12',
          "support/test_layouts.py::test_potsdam_splits_are_the_publishers"),
    Fault("support/layouts.py",
          "Vaihingen's test set has an area of the training set instead of its own",
          '"train": "1 3 5 11 13 15 21 23 26 30 32 34",\n    "val": "7 17 28 37",\n    "test": "2',
          '"train": "2 3 5 11 13 15 21 23 26 30 32 34",\n    "val": "7 17 28 37",\n    "test": "1',
          "support/test_layouts.py::test_vaihingen_splits_are_the_publishers"),
    Fault("support/layouts.py", "trees and low vegetation have each other's colours",
          "(0, 255, 255), (0, 255, 0),",
          "(0, 255, 0), (0, 255, 255),",
          "support/test_layouts.py::test_potsdams_colours_are_the_publishers"),
    Fault("support/layouts.py", "the label with eroded boundaries comes first",
          "Tile(tile, image, label or eroded, eroded)",
          "Tile(tile, image, eroded or label, eroded)",
          "support/test_layouts.py::test_full_labels_come_first_and_the_eroded_ones_beside_them"),
    Fault("support/cache.py", "a changed file keeps its name",
          "status.st_mtime_ns, ",
          "",
          "support/test_cache.py::test_a_name_changes_with_the_source"),
    Fault("support/cache.py", "a part of an array has its final name",
          '            with open(temporary, "wb") as file:\n',
          '            with open(temporary, "wb") as file:\n'
          "                path.exists() or os.link(temporary, path)\n",
          "support/test_cache.py::test_an_interrupted_decode_leaves_nothing"),
    Fault("support/cache.py", "an array that is not whole is found",
          "if path.stat().st_size != self.offset + self.size * self.dtype.itemsize:",
          "if False:",
          "support/test_cache.py::test_a_file_that_is_not_whole_is_not_found"),
    Fault("support/audit.py", "an unfit data set ends with 0",
          "        return 1\n",
          "        return 0\n",
          "support/test_audit.py::test_defects_are_found"),
    Fault("support/audit.py", "an image is read no further than its first rows",
          "for top in range(0, H, ROWS):\n",
          "for top in range(0, min(H, ROWS), ROWS):\n",
          "support/test_audit.py::test_every_row_is_decoded"),
    Fault("support/audit.py", "missing tiles are only a note",
          '(notes if split == "test" else faults).extend(files.gaps)',
          "notes.extend(files.gaps)",
          "support/test_audit.py::test_missing_tiles_fail_where_one_trains"),
    Fault("support/tiff.py", "a TIFF's predictor is forgotten",
          "copied = (COMPRESSION, PREDICTOR, JPEG_TABLES,",
          "copied = (COMPRESSION, JPEG_TABLES,",
          "support/test_tiff.py::test_what_pillow_writes"),
    Fault("support/tiff.py", "separate planes come in the wrong order",
          "np.concatenate(planes, axis=-1)",
          "np.concatenate(planes[::-1], axis=-1)",
          "support/test_tiff.py::test_every_layout_is_read_as_stored"),
    Fault("support/tiff.py", "infrared is lost",
          "tags[EXTRA_BANDS] = (3, (2,))",
          "tags[EXTRA_BANDS] = (3, (0,))",
          "support/test_tiff.py::test_every_layout_is_read_as_stored"),
    Fault("support/images.py", "16 bits are read as 8",
          "    check_values(path, found)\n",
          "",
          "support/test_images.py::test_what_would_be_lost_or_guessed_is_refused_by_name"),
    Fault("support/images.py", "a truncated PNG or JPEG is grey at the bottom",
          "from PIL import Image\n",
          "from PIL import Image, ImageFile\nImageFile.LOAD_TRUNCATED_IMAGES = True\n",
          "support/test_images.py::test_what_would_be_lost_or_guessed_is_refused_by_name"),
    Fault("support/images.py", "an image that its orientation tag turns is read as stored",
          "if found.orientation != 1:",
          "if False:",
          "support/test_images.py::test_what_would_be_lost_or_guessed_is_refused_by_name"),
    Fault("support/tiff.py", "a truncated TIFF is opened",
          "if end > (length := os.path.getsize(path)):",
          "if end > 2 * (length := os.path.getsize(path)):",
          "support/test_images.py::test_a_truncated_tiff_is_known_before_its_pixels_are_read"),
    Fault("support/tiff.py", "a chunk that was never written holds what was read before it",
          "                self.fill,\n",
          "                99,\n",
          "support/test_nodata.py::test_strips_never_written_are_the_no_data_value"),
    Fault("support/tiff.py", "16 bits are taken in this machine's order",
          "view(self.dtype.newbyteorder(order))",
          "view(self.dtype)",
          "support/test_masks.py::test_whole_numbers_of_every_type"),
    Fault("support/raster.py", "EXIF of a JPEG is not looked at",
          "bands, 8, mode, orientation=turned)",
          "bands, 8, mode)",
          "support/test_raster.py::test_an_image_that_viewers_turn_is_refused_in_every_format"),
    Fault("support/nodata.py", "transparent pixels hold data",
          "valid &= alpha != 0",
          "valid &= alpha >= 0",
          "support/test_nodata.py::test_what_says_that_there_is_nothing_is_heard"),
    Fault("support/nodata.py", "a pixel with one dark band holds no data",
          "in enumerate(self.values):",
          "in enumerate(self.values[:1]):",
          "support/test_nodata.py::test_a_pixel_with_one_band_of_that_value_is_data"),
    Fault("support/nodata.py", "an overview is taken for a mask",
          "& (OVERVIEW | MASK) == MASK:",
          "& (OVERVIEW | MASK):",
          "support/test_nodata.py::test_an_overview_is_no_mask"),
    Fault("support/decode.py", "one learns what lies where there is no data",
          "LabelReader(path, self.classes, self.encoding, image)",
          "LabelReader(path, self.classes, self.encoding)",
          "support/test_nodata.py::test_labels_are_ignored_where_the_image_has_no_data"),
    Fault("support/decode.py", "a cached label does not know its image's mask",
          "image.no_data.stamp())",
          "'')",
          "support/test_nodata.py::test_a_changed_mask_beside_the_image_changes_the_label"),
    Fault("support/masks.py", "a JPEG is a mask",
          'if found.format == "JPEG":',
          "if False:",
          "support/test_masks.py::test_a_jpeg_is_no_mask"),
    Fault("support/masks.py", "values between two indices are rounded down",
          " & (values == indices))",
          ")",
          "support/test_masks.py::test_other_values"),
    Fault("support/masks.py", "transparent pixels are black",
          "if not pixels[..., self.alpha].all():",
          "if False:",
          "support/test_masks.py::test_transparent_pixels_may_be_a_class_or_none"),
    Fault("support/labels.py", "unknown colours of one's own masks are ignored",
          "            max_unknown = 0  # the default",
          "            pass  # the default",
          "support/test_labels.py::test_an_unknown_colour_of_ones_own_is_an_error"),
    Fault("support/labels.py", "a no-data value comes before the classes",
          "            table[int(declared)] = IGNORE  # unless it is a class\n"
          "        for k, value in enumerate(self.encoding.values):\n"
          "            table[value] = k\n",
          "            table[int(declared)] = IGNORE  # unless it is a class\n"
          "        for k, value in enumerate(self.encoding.values):\n"
          "            table[value] = IGNORE if value == declared else k\n",
          "support/test_labels.py::test_a_no_data_value_is_ignored_unless_it_is_a_class"),
    Fault("data.py", "one trains on a class without a pixel",
          '            if split == "train":\n                raise',
          "            if False:\n                raise",
          "support/test_audit.py::"
          "test_a_class_that_does_not_occur_in_train_is_a_fault_with_its_likely_cause"),
    Fault("support/audit.py", "dark water is a label",
          "near.mean() > CORNERS and saturated.mean() > SATURATED",
          "near.mean() > CORNERS",
          "support/test_audit.py::test_no_usual_tile_is_taken_for_a_label"),
    Fault("support/names.py", "hidden files are images",
          'not name.startswith((".", "~$"))',
          'not name.startswith("~$")',
          "support/test_names.py::test_what_is_no_image_is_passed_over"),
    Fault("support/names.py", "of two possible masks the first is taken",
          "if len(candidates) > 1:",
          "if False:",
          "support/test_names.py::test_what_may_be_two_masks_is_none"),
    Fault("support/maps.py", "a map has classes where there is no data",
          "        if valid is not None:\n",
          "        if False:\n",
          "support/test_maps.py::test_no_data_is_declared_in_each_file"),
    Fault("support/geotiff.py", "a map does not declare its no-data value",
          "        if self.no_data is not None:\n            tags[",
          "        if False:\n            tags[",
          "support/test_maps.py::test_no_data_is_declared_in_each_file"),
    Fault("support/pictures.py", "an overlay is black where there is no data",
          "        part[shown == IGNORE] = 0\n",
          "",
          "support/test_maps.py::test_no_data_is_declared_in_each_file"),
    Fault("support/scenes.py", "windows without data are computed",
          "needed = first or valid is None or",
          "needed = True or",
          "support/test_scenes.py::test_windows_without_data_are_not_computed_and_change_nothing"),
    Fault("support/protocols.py", "a mean over one class looks like one over all",
          "if iou is None]:",
          "if iou == 7]:",
          "support/test_protocols.py::test_a_mean_over_fewer_classes_says_so"),
]
# fmt: on

# --- The scores -----------------------------------------------------------------------------------

METRICS = "support/test_metrics.py"

# fmt: off
SCORES = [
    Fault("support/metrics.py", "the confusion matrix is transposed",
          "torch.from_numpy(counts.reshape(num_classes, num_classes))",
          "torch.from_numpy(counts.reshape(num_classes, num_classes).T.copy())",
          f"{METRICS}::test_matrix_counted_by_hand"),
    Fault("support/metrics.py", "IoU without false positives",
          "zip(right, truth + predicted - right, strict=True)",
          "zip(right, truth, strict=True)",
          f"{METRICS}::test_scores_by_hand"),
    Fault("support/metrics.py", "an absent class scores 0",
          "return float(numerator / denominator) if denominator else None",
          "return float(numerator / denominator) if denominator else 0.0",
          f"{METRICS}::test_an_absent_class_is_none_and_left_out_but_a_class_only_predicted_is_zero"),
    Fault("support/metrics.py", "kappa is divided by 1",
          "total**2 - chance)",
          "total**2)",
          f"{METRICS}::test_scores_by_hand"),
    Fault("support/metrics.py", "labels are eroded by 2 pixels",
          "def erode(label: Map, radius: int = 3,",
          "def erode(label: Map, radius: int = 2,",
          f"{METRICS}::test_the_disc_is_euclidean"),
    Fault("support/metrics.py", "the disc is a square",
          "if dy**2 + dx**2 <= radius**2:",
          "if True:",
          f"{METRICS}::test_the_disc_is_euclidean"),
    Fault("support/metrics.py", "boundaries may be off by 2 pixels, not 3",
          "num_classes: int, radius: int = 3,",
          "num_classes: int, radius: int = 2,",
          f"{METRICS}::test_an_edge_is_found_up_to_three_pixels_away"),
    Fault("support/metrics.py", "a boundary of another class is a hit",
          "same = predicted[here] == true[there]",
          "same = (predicted[here] >= 0) == (true[there] >= 0)",
          f"{METRICS}::test_a_boundary_of_another_class_is_not_a_hit"),
    Fault("support/metrics.py", "boundary F1 is the mean of precision and recall",
          "2 * precision * recall / ((precision + recall) or 1)",
          "(precision + recall) / 2",
          f"{METRICS}::test_boundary_f1_counted_by_hand"),
    Fault("support/metrics.py", "boundary precision and recall have each other's divisor",
          "predicted_hit / max(predicted, 1), true_hit / max(true, 1)",
          "predicted_hit / max(true, 1), true_hit / max(predicted, 1)",
          f"{METRICS}::test_boundary_precision_and_recall_have_their_own_divisors"),
    Fault("support/metrics.py", "what is predicted clutter counts nowhere either",
          "dropped[clutter] = 0  #",
          "dropped[clutter] = dropped[:, clutter] = 0  #",
          f"{METRICS}::test_conventions_by_hand"),
    Fault("support/metrics.py", "GeoSeg's padding is predicted class 0",
          "padded[0] += _array(padding)",
          "padded[:, 0] += _array(padding)",
          f"{METRICS}::test_geosegs_padding_counts_as_class_0"),
    Fault("support/metrics.py", "mmsegmentation's last crop is not moved back",
          "max(0, min(start, length - crop)) for start",
          "start for start",
          f"{METRICS}::test_crops_by_hand"),
    Fault("support/protocols.py", "GeoSeg's padding is below and to the right",
          "piece[above:, left:] = image",
          "piece[: height - above, : width - left] = image",
          "support/test_protocols.py::test_the_padding_and_nothing_but_the_padding_is_counted"),
    Fault("support/protocols.py", "eroded labels are scored as full ones",
          "if scene.eroded is not scene.label:",
          "if True:",
          "support/test_protocols.py::test_only_eroded_labels"),
    Fault("support/protocols.py", "a domain has its last scene alone",
          "self.domains.get(scene.domain, 0) + matrix",
          "matrix",
          "support/test_protocols.py::test_scores_of_each_domain"),
]
# fmt: on

# --- Inference ------------------------------------------------------------------------------------

# fmt: off
INFERENCE = [
    Fault("support/scenes.py", "weights do not add up to 1",
          "ramp / total[start : start + window] for start",
          "ramp / ramp.max() for start",
          "support/test_scenes.py::test_weights_sum_to_one_at_every_pixel_of_every_length"),
    Fault("support/scenes.py", "the last window does not reach the edge",
          "starts = [*range(0, length - window, step), length - window]",
          "starts = [*range(0, length - window + 1, step)]",
          "support/test_scenes.py::test_weights_sum_to_one_at_every_pixel_of_every_length"),
    Fault("support/scenes.py", "the row of windows before is forgotten",
          "            blended[:, :shared] += pending\n",
          "            pass\n",
          "test_infer.py::test_windows_leave_no_trace"),
    Fault("infer.py", "logits are upsampled with aligned corners",
          "upsample(logits, images.shape[-2:])",
          "nn.functional.interpolate("
          'logits, images.shape[-2:], mode="bilinear", align_corners=True)',
          "test_infer.py::test_low_resolution_logits_are_upsampled_in_place"),
    Fault("infer.py", "a small tile is continued in black",
          "windows.index_select(axis, torch.minimum(i, 2 * length - 1 - i))",
          "nn.functional.pad(windows, (0, 0, 0, (axis == 2) * beyond, 0, (axis == 1) * beyond))",
          "test_infer.py::test_a_small_tile_is_mirrored"),
    Fault("infer.py", "an orientation is turned back the wrong way",
          "p.rot90(-quarter, (2, 3))",
          "p.rot90(quarter, (2, 3))",
          "test_infer.py::test_with_every_orientation_none_is_special"),
    Fault("infer.py", "an orientation is not flipped back",
          "probabilities(model, turned.flip(2)).flip(3)",
          "probabilities(model, turned.flip(2))",
          "test_infer.py::test_with_every_orientation_none_is_special"),
    Fault("support/scenes.py", "a batch that did not fit is left out",
          "            batch.halve()\n            continue\n",
          "            waiting = waiting[batch.size :]\n            batch.halve()\n"
          "            continue\n",
          "test_infer.py::test_a_batch_that_does_not_fit_is_halved_for_all_scenes_to_come"),
    Fault("support/scenes.py", "what fails behind is forgotten",
          "        if self.last and error is None:\n",
          "        if False:\n",
          "support/test_scenes.py::test_what_fails_behind_is_raised"),
    Fault("infer.py", "logits that are not finite become a map",
          "    cli.require(not broken,",
          "    cli.require(True,",
          "test_infer.py::test_logits_that_are_not_finite_are_no_map"),
    Fault("support/geotiff.py", "the last blocks are left out",
          "        while self.compressed:\n",
          "        if self.compressed:\n",
          "support/test_geotiff.py::test_rows_come_back"),
    Fault("support/geotiff.py", "colours are filtered over a pixel too many",
          "lines[:, self.bands + 1 :] -= rows[:, : -self.bands]",
          "lines[:, 2 * self.bands + 1 :] -= rows[:, : -2 * self.bands]",
          "support/test_geotiff.py::test_colours_come_back"),
    Fault("infer.py", "the CNN is in best.pt",
          '{"model": model.transformer.state_dict()}',
          '{"model": model.state_dict()}',
          "test_train.py::test_best_is_the_branch_and_nothing_else"),
    Fault("infer.py", "best.pt is loaded in training mode",
          "    return transformer.eval()",
          "    return transformer",
          "test_infer.py::test_what_is_loaded_is_what_was_saved"),
    Fault("support/protocols.py", "a submission counts classes from 1",
          "Image.fromarray(labels).save",
          "Image.fromarray(labels + 1).save",
          "test_infer.py::test_the_submission"),
    Fault("support/stretch.py", "LOW and HIGH are taken where they are not",
          "[np.searchsorted(below, share)]",
          "[np.searchsorted(below, share) - 1]",
          "support/test_stretch.py::test_the_limits_are_percentiles_of_all_images_together"),
    Fault("support/stretch.py", "pixels without data are measured",
          "if valid is None else pixels[valid]",
          "if True else pixels[valid]",
          "support/test_stretch.py::test_pixels_without_data_are_not_measured"),
    Fault("support/decode.py", "a cached image does not know its stretch",
          'f"image {self.stretch}" if self.stretch else "image"',
          '"image"',
          "support/test_stretch.py::test_another_stretch_is_another_image_in_the_cache"),
    Fault("infer.py", "best.pt forgets the stretch",
          'Stretch.of_lists(known.get("stretch"))',
          'Stretch.of_lists(known.get(""))',
          "support/test_stretch.py::test_training_and_mapping_see_the_same_pixels"),
    Fault("support/place.py", "an .aux.xml stays behind",
          'files[".aux.xml"] = placed',
          "pass",
          "support/test_place.py::test_only_what_says_where_is_carried_from_an_aux_xml"),
    Fault("support/place.py", "rational polynomial coefficients stay behind",
          "34736, 34737, 50844)",
          "34736, 34737)",
          "support/test_place.py::test_tags_are_carried"),
    Fault("support/place.py", "a mask may lie anywhere",
          "if distance <= TOLERANCE:",
          "if distance <= 1000:",
          "support/test_place.py::test_a_mask_that_lies_elsewhere"),
    Fault("support/place.py", "a world file gives the pixel's corner",
          "x - (b + c) / 2, b, c",
          "x, b, c",
          "support/test_place.py::test_a_world_file_gives_the_centre_of_the_first_pixel"),
    Fault("support/place.py", "the coordinate system is lost",
          "GEO_TAGS = (SCALE, TIE_POINTS, MATRIX, KEYS,",
          "GEO_TAGS = (SCALE, TIE_POINTS, MATRIX,",
          "support/test_geotiff.py::test_tags_are_carried_with_their_types"),
    Fault("support/place.py", "the image's no-data value is copied",
          "GEO_TAGS = (SCALE, TIE_POINTS,",
          "GEO_TAGS = (42113, SCALE, TIE_POINTS,",
          "support/test_geotiff.py::test_tags_are_carried_with_their_types"),
    Fault("support/geotiff.py", "the palette is red, green, blue by colour",
          "257 * palette.T.ravel()",
          "257 * palette.ravel()",
          "support/test_geotiff.py::test_rows_come_back"),
    Fault("support/geotiff.py", "the last strip is not written",
          "        if len(self.waiting):\n            self.hand_over(len(self.waiting))\n",
          "",
          "support/test_geotiff.py::test_rows_come_back"),
]
# fmt: on

# --- Weights that come in, models that go out -----------------------------------------------------

# fmt: off
WEIGHTS = [
    Fault("support/safetensors.py", "tensors may lie anywhere in the data",
          "if begin != end or after - begin",
          "if after - begin",
          "support/test_safetensors.py::test_damage_is_said"),
    Fault("support/safetensors.py", "bytes behind the last tensor are not noticed",
          "    if end != len(content):",
          "    if end > len(content):",
          "support/test_safetensors.py::test_damage_is_said"),
    Fault("support/safetensors.py", "offsets are written from the start of the file",
          '"data_offsets": [end, end + len(data)]',
          '"data_offsets": [end + 8, end + 8 + len(data)]',
          "support/test_safetensors.py::test_what_is_written_is_read"),
    Fault("support/segformer.py", "values come before keys",
          '"attention.self.key + attention.self.value"',
          '"attention.self.value + attention.self.key"',
          "support/test_segformer.py::test_both_namings_are_of_the_same_weights"),
    Fault("support/segformer.py", "the parts of the fusion are taken in the order of the stages",
          "F.chunk(4, dim=1)[::-1]",
          "F.chunk(4, dim=1)",
          "support/test_segformer.py::test_the_head_is_folded"),
    Fault("support/segformer.py", "the head's biases are lost",
          "mean = mean - F_s @ state.pop",
          "mean = mean - 0 * F_s @ state.pop",
          "support/test_segformer.py::test_the_head_is_folded"),
    Fault("support/segformer.py", "stages of the authors' names count from 0",
          '"s": int(places["n"]) - 1',
          '"s": int(places["n"])',
          "support/test_segformer.py::test_there_and_back_is_the_identity"),
    Fault("support/pretrained.py", "a file of weights may hold anything",
          "weights_only=True)\n    except",
          "weights_only=False)\n    except",
          "support/test_pretrained.py::test_a_bad_file_gets_one_sentence"),
    Fault("support/pretrained.py", "checksums are not looked at",
          "damaged = archive.testzip()",
          "damaged = None",
          "support/test_pretrained.py::test_a_bad_file_gets_one_sentence"),
    Fault("support/pretrained.py", "weights that are not finite are taken",
          "if name := not_finite(tensors):",
          "if name := None:",
          "support/test_pretrained.py::test_a_bad_file_gets_one_sentence"),
    Fault("support/pretrained.py", "infrared takes the sum of the colours",
          "kernels.mean(1, keepdim=True)",
          "kernels.sum(1, keepdim=True)",
          "support/test_pretrained.py::test_infrared_gets_the_mean_of_the_colours"),
    Fault("support/pretrained.py", "what is not used is not said",
          "    if weights.unused:\n",
          "    if False:\n",
          "support/test_pretrained.py::test_an_encoder_leaves_the_head"),
    Fault("support/export.py", "the exported logits are at a quarter of the size",
          "size = images.shape[-2:]",
          "size = [side // 4 for side in images.shape[-2:]]",
          "support/test_export.py::test_logits_are_of_the_images_size"),
    Fault("infer.py", "our kernels are exported",
          'with force("pytorch"):',
          'with force("triton"):',
          "test_infer.py::test_no_kernel_of_ours_is_exported"),
    Fault("train.py", "a resumed run starts again from the pretrained weights",
          "starts = config.pretrained and not config.resume",
          "starts = config.pretrained",
          "test_train.py::test_a_resumed_run_goes_on_from_its_own_weights"),
    Fault("train.py", "the pretrained weights are read and not used",
          "pretrained.start_from(model.transformer, weights)",
          "pretrained.start_from(CTCLM(model.config).transformer, weights)",
          "test_train.py::test_a_run_starts_from_published_weights"),
]
# fmt: on

# --- Checkpoints, and how a program ends ----------------------------------------------------------

# fmt: off
CHECKPOINTS = [
    Fault("support/checkpoint.py", "a file is written straight to its final name",
          """\
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if before and path.exists():
            os.replace(path, before)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
""",
          """\
    with open(path, "w+b") as file:
        yield file
""",
          "support/test_checkpoint.py::test_a_failed_save_leaves_the_old_file"),
    Fault("support/checkpoint.py", "a file is renamed before it is on the disk",
          "            os.fsync(file.fileno())\n",
          "",
          "support/test_checkpoint.py::test_bytes_are_on_the_disk_before_the_name_is"),
    Fault("support/checkpoint.py", "the checksum is not compared",
          "return not found or zlib.crc32",
          "return True or zlib.crc32",
          "support/test_checkpoint.py::test_a_flipped_bit_is_noticed_wherever_it_is"),
    Fault("support/checkpoint.py", "checksums inside an older file are not compared",
          "damaged = archive.testzip()",
          "damaged = None",
          "support/test_checkpoint.py::test_a_file_without_a_checksum_of_its_own"),
    Fault("support/checkpoint.py", "a damaged checkpoint ends the run",
          "            faults.append(str(error))\n            continue\n",
          "            raise\n",
          "support/test_resume.py::test_a_damaged_checkpoint_is_named_and_the_one_before_taken"),
    Fault("support/checkpoint.py", "one checkpoint is kept",
          "save(contents, out / NEWEST, out / BEFORE)",
          "save(contents, out / NEWEST)",
          "support/test_resume.py::test_a_damaged_checkpoint_is_named_and_the_one_before_taken"),
    Fault("support/checkpoint.py", "half-written files stay",
          "            abandoned.unlink()\n",
          "            pass\n",
          "support/test_resume.py::test_killed_before_its_first_checkpoint_a_run_starts_again"),
    Fault("support/checkpoint.py", "a limit on a file's size is a traceback",
          "errno.ENOSPC, errno.EDQUOT, errno.EFBIG}",
          "errno.ENOSPC, errno.EDQUOT}",
          "support/test_resume.py::test_a_full_disk_loses_nothing"),
    Fault("support/checkpoint.py", "code in a file is run",
          'torch.load(BytesIO(data), "cpu", weights_only=True)',
          'torch.load(BytesIO(data), "cpu", weights_only=False)',
          "support/test_checkpoint.py::test_code_in_a_file_is_not_run"),
    Fault("support/checkpoint.py", "any checkpoint will do",
          'if contents["kind"] != kind:',
          "if False:",
          "support/test_checkpoint.py::test_missing_and_other_kinds"),
    Fault("support/checkpoint.py", "weights may be NaN",
          'if name := not_finite(contents["model"]):',
          "if name := None:",
          "support/test_checkpoint.py::test_not_finite_weights_are_refused"),
    Fault("support/cli.py", "bad input ends with 1",
          "    sys.exit(2)\n",
          "    sys.exit(1)\n",
          "support/test_cli.py::test_how_a_run_ends"),
    Fault("support/cli.py", "a second signal is remembered too",
          "        signal.signal(number, signal.SIG_DFL)\n",
          "",
          "support/test_cli.py::test_a_stop_signal_is_remembered_and_a_second_one_acts"),
]
# fmt: on

# --- Several processes: support/ranks.py ----------------------------------------------------------

# fmt: off
HALVES = "support/test_ranks.py::test_two_halves_are_a_whole_and_a_stalled_rank_is_named"
RANKS = [
    Fault("support/ranks.py", "gradients are added, not averaged",
          "        flat /= self.count\n", "", HALVES),
    Fault("support/ranks.py", "a sum over ranks has a gradient of one rank",
          "        ctx.ranks.reduce(total)\n", "", HALVES),
    Fault("support/ranks.py", "batch statistics are of one rank",
          "module.__class__, module.ranks = SharedBatchNorm, self", "pass", HALVES),
    Fault("support/ranks.py", "the running variance is biased",
          "variance * n / (n - 1)", "variance", HALVES),
    Fault("ctclm.py", "the ranks' means count alike, however many pixels they have",
          "share = n / self.add_up(n).clamp(min=1)", "share = 0.5", HALVES),
    Fault("ctclm.py", "the covariance is of one rank",
          "return add_up(centred.T @ centred) / n", "return centred.T @ centred / n * 2", HALVES),
    Fault("ctclm.py", "the alignment is of one rank",
          "return add_up((values * counts).sum()) / add_up(counts.sum()).clamp(min=1)",
          "return (values * counts).sum() / counts.sum().clamp(min=1)", HALVES),
    Fault("support/protocols.py", "the scores are of one rank's scenes",
          "        for tally in tallies:\n", "        for tally in tallies[:1]:\n", HALVES),
    Fault("support/ranks.py", "a stalled rank is not named",
          "if not (missing := self.missing()):", "if not (missing := []):", HALVES),
    Fault("support/ranks.py", "every rank writes to the terminal",
          "        if quiet and rank > 0:\n", "        if False:\n",
          "support/test_ranks.py::test_a_signal_to_one_rank_stops_both_and_saves_once"),
    Fault("train.py", "a signal stops the rank that gets it",
          "stopped = self.ranks.agree(stop.received)", "stopped = stop.received",
          "support/test_ranks.py::test_a_signal_to_one_rank_stops_both_and_saves_once"),
]
# fmt: on

# --- The experiment: experiments/ablation.py ------------------------------------------------------

ABLATION, TABLE = "experiments/ablation.py", "experiments/table.py"
ABLATION_TEST = "experiments/test_ablation.py::"

# fmt: off
EXPERIMENT = [
    Fault(ABLATION, "the mean is over all steps",
          "self.from_step = round((1 - AVERAGED) * options.steps)",
          "self.from_step = 0",
          f"{ABLATION_TEST}test_the_mean_is_over_the_last_tenth_of_the_steps"),
    Fault(ABLATION, "batch norms keep their last statistics",
          "return [x for x in self.model.state_dict().values() if x.is_floating_point()]",
          "return [*self.model.parameters()]",
          f"{ABLATION_TEST}test_the_mean_is_over_the_last_tenth_of_the_steps"),
    Fault(ABLATION, "maps are of the last weights",
          "                cell.use_mean()\n                if name in names",
          "                if name in names",
          f"{ABLATION_TEST}test_scores_are_of_the_mean_weights_on_each_split"),
    Fault(ABLATION, "the frozen teacher has not learned",
          'frozen.model.cnn.load_state_dict(cells["cnn"].model.cnn.state_dict())',
          "pass",
          f"{ABLATION_TEST}test_the_frozen_teacher_is_the_mean_cnn"),
    Fault(ABLATION, "a stopped cell forgets its mean",
          'self.step, self.mean = state["step"], [x.to(self.device) for x in state["mean"]]',
          'self.step = state["step"]',
          f"{ABLATION_TEST}test_a_cell_that_was_stopped_ends_in_the_same_weights"),
    Fault(ABLATION, "all scenes together are those of the last split",
          'counts["all"] = tuple(map(sum, zip(*counts.values(), strict=True)))',
          'counts["all"] = [*counts.values()][-1]',
          f"{ABLATION_TEST}test_all_scenes_together_are_counted_together"),
    Fault(TABLE, "differences are not paired by seed",
          "for seed in sorted(ours.keys() & theirs.keys())]",
          "for seed in sorted(ours) if theirs.setdefault(seed, 0.0) is not None]",
          "experiments/test_table.py::test_only_seeds_that_both_settings_have_are_compared"),
    Fault(TABLE, "the interval is of the normal distribution",
          "T_QUANTILES[n - 2] * statistics.stdev",
          "1.96 * statistics.stdev",
          "experiments/test_table.py::test_interval_by_hand"),
    Fault("experiments/settings.py", "the penalty's projections are outside of autocast",
          "        projections = self.shared_space(output)\n        with torch.autocast("
          "labels.device.type, enabled=False):\n",
          "        with torch.autocast(labels.device.type, enabled=False):\n"
          "            projections = self.shared_space(output)\n",
          "experiments/test_settings.py::test_each_setting_learns_in_half_precision"),
]

# --- Notebooks and figures ------------------------------------------------------------------------

FIGURES, SOLVED = "experiments/test_figures.py", "test_solutions.py"
TEACHING = [
    Fault("kernels/distill.py", "the transfer's teacher learns: its notebook stops",
          "kl_divergence(teacher=log_p_c.detach(), student=log_p_t)",
          "kl_divergence(teacher=log_p_c, student=log_p_t)",
          "'test_notebooks.py::test_it_runs_and_prints_what_it_shows[03_transfer]'"),
    Fault("kernels/upsample.py", "a dual cell has other weights: its notebook stops",
          'mode="linear", align_corners=False',
          'mode="linear", align_corners=True',
          "'test_notebooks.py::test_it_runs_and_prints_what_it_shows[05_kernels]'"),
    Fault("notebooks/solutions.py", "two halves of a softmax are joined without rescaling",
          "torch.exp(state[0] - top)",
          "torch.exp(0 * state[0])",
          f"{SOLVED}::test_two_halves_join"),
    Fault("notebooks/solutions.py", "the 3 x 3 is merged without turning it",
          "small.flip(2, 3)",
          "small",
          f"{SOLVED}::test_one_kernel_of_13_agrees_inside_and_not_at_the_border"),
    Fault("notebooks/solutions.py", "the penalty's gradient includes the diagonal",
          "covariance - torch.diag(torch.diagonal(covariance))",
          "covariance",
          f"{SOLVED}::test_the_penaltys_gradient"),
    Fault("experiments/figures_parts.py", "the sum of the kernels is flat",
          "total += covered",
          "total = covered",
          f"{FIGURES}::test_the_sum_of_the_kernels_counts_them"),
    Fault("experiments/figures_teaching.py", "errors are marked at ignored pixels",
          " & (sample.truth != IGNORE)",
          "",
          f"{FIGURES}::test_errors_are_where_a_branch_is_wrong_and_not_where_the_label_is_ignored"),
    Fault("support/pictures.py", "a colour that colour-blind people take for another",
          "(0, 158, 115), (204, 121, 167)",
          "(0, 158, 115), (213, 94, 90)",
          "support/test_pictures.py::test_colours_can_be_told_apart_by_colour_blind_people"),
    Fault("support/pictures.py", "a signed map has its colours exchanged",
          "gate_colours(0.5 + 0.5 *",
          "gate_colours(0.5 - 0.5 *",
          "support/test_pictures.py::test_heat_and_signed"),
]
# fmt: on

FAULTS = [
    *(METHOD + LOOP + KERNELS + DATA + SCORES + INFERENCE),
    *(WEIGHTS + CHECKPOINTS + RANKS + EXPERIMENT + TEACHING),
]


# --- The program ----------------------------------------------------------------------------------


def copy_files(folder: Path) -> Path:
    """The clone's files, without what git ignores."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).exists():  # not deleted since the last commit
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


def run_tests(folder: Path, node_ids: list[str], jobs: int) -> tuple[int | None, str]:
    """pytest's exit code, None if it took too long, and what it printed."""
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    # Two versions of a file may have one size and one second: compiled code would be the old one's.
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": threads}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *node_ids]
    with tempfile.TemporaryFile("w+") as log:
        try:
            streams = {"stdout": log, "stderr": log}
            code = subprocess.run(
                command, cwd=folder, env=environment, timeout=TIMEOUT, **streams
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
        log.seek(0)
        return code, log.read()


def check_unplanted(folders: list[Path], node_ids: list[str]) -> None:
    """Each test once, shared among the folders; ends the program unless all pass."""
    jobs = len(folders)
    shares = [node_ids[job::jobs] for job in range(min(jobs, len(node_ids)))]
    with ThreadPoolExecutor(jobs) as pool:
        for code, printed in pool.map(run_tests, folders, shares, [jobs] * jobs):
            if code != 0:
                print(printed[-4000:])
                sys.exit("the tests must pass before a fault is planted")


def try_fault(fault: Fault, free: Queue, jobs: int) -> tuple[str, float, str]:
    """The verdict, seconds, and what pytest printed."""
    folder, begin = free.get(), time.perf_counter()
    path = folder / fault.file
    whole = path.read_text()
    path.write_text(fault.planted(whole))
    try:
        code, printed = run_tests(folder, fault.node_ids(), jobs)
    finally:
        path.write_text(whole)
        free.put(folder)
    return VERDICTS.get(code, "BROKEN"), time.perf_counter() - begin, printed


def plant_all(faults: list[Fault], folders: list[Path]) -> int:
    """Plant each fault, print its verdict -> how many were caught."""
    begin, caught, jobs, free = time.perf_counter(), 0, len(folders), Queue()
    for folder in folders:
        free.put(folder)
    pool = ThreadPoolExecutor(jobs)
    try:
        running = {pool.submit(try_fault, fault, free, jobs): fault for fault in faults}
        for done, future in enumerate(as_completed(running), 1):
            verdict, seconds, printed = future.result()
            caught += verdict == "caught"
            left = (time.perf_counter() - begin) / done * (len(faults) - done)
            line = f"{verdict}  {running[future]}"
            print(f"{line:90} {seconds:5.1f} s   {duration(left)} left", flush=True)
            if verdict == "BROKEN":
                print(printed[-2000:], flush=True)
    finally:  # Ctrl-C ends it after the tests that run
        pool.shutdown(cancel_futures=True)
    return caught


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="text in the file or the name of a fault")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    options = parser.parse_args()
    faults = [fault for fault in FAULTS if options.only in str(fault)]
    for fault in faults:
        fault.planted((ROOT / fault.file).read_text())  # a text that has changed is known at once
    with tempfile.TemporaryDirectory() as scratch:
        folders = [copy_files(Path(scratch, str(job))) for job in range(options.jobs)]
        node_ids = sorted({node_id for fault in faults for node_id in fault.node_ids()})
        print(f"{len(faults)} faults; their {len(node_ids)} tests without a fault", flush=True)
        check_unplanted(folders, node_ids)
        caught = plant_all(faults, folders)
    print(f"{len(faults)} planted, {caught} caught")
    return int(caught != len(faults))


if __name__ == "__main__":
    sys.exit(main())
