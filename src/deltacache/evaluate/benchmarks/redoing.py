"""Pictures of a finished evaluation made again, with a decoder of pictures that it did not have."""

import shutil
from dataclasses import replace

from deltacache.evaluate import output
from deltacache.evaluate.benchmarks.blocks import Block
from deltacache.evaluate.benchmarks.run import BenchmarkRun
from deltacache.evaluate.benchmarks.spreading import spread_out
from deltacache.evaluate.benchmarks.worker import WorkerPlan
from deltacache.evaluate.model_record import read_models, write_models
from deltacache.schemas.configs import save_config
from deltacache.schemas.progress import Reporter


def lacks_pictures(run: BenchmarkRun) -> bool:
    """Whether a decoder is given that did not make the pictures that are there."""
    decoder, recorded = run.inputs.rgb_fingerprint, read_models(run.settings.out)
    return decoder is not None and (recorded is None or recorded.rgb_decoder != decoder)


def redo_pictures(run: BenchmarkRun, plan: WorkerPlan, reporter: Reporter) -> None:
    """Write the examples of benchmarks again; the tables and what else is there stay."""
    out = run.settings.out
    blocks = [_examples_alone(block) for block in run.blocks if block.examples]
    reporter.line(f"evaluate: {out / output.METRICS} holds these numbers already: pictures alone are made")
    with (
        output.new_folder(out / output.EXAMPLES) as folder,
        reporter.stage("pictures", sum(len(block.sequences) for block in blocks)) as stage,
    ):
        if (out / output.EXAMPLES).exists():
            shutil.copytree(out / output.EXAMPLES, folder, dirs_exist_ok=True)
        for _, result in spread_out(run, blocks, plan, stage.advance, reporter.line):
            for name, content in result.examples.items():
                (folder / name).write_bytes(content)
    (out / output.REPORT).unlink(missing_ok=True)
    save_config(run.settings, out / output.CONFIG)
    write_models(out, run.models)


def _examples_alone(block: Block) -> Block:
    return replace(
        block, sequences=tuple(each for each in block.sequences if each.sequence_id in block.examples)
    )
