"""From Python: check a config, verify its layout, train, and evaluate.

    python examples/from_python.py

It takes the quickstart's config with fewer and shorter sequences. ``verify``, ``train`` and ``evaluate`` start the
processes that the layout needs and return what the commands of these names print.
"""

from pathlib import Path

import longspan

run = longspan.load(
    Path(__file__).with_name("quickstart.yaml"),
    sequence_len=1024,
    max_steps=4,
    warmup_steps=1,
    eval_max_samples=4,
    output_dir="outputs/examples/from_python",
)
print(run.sizes.equation(), "|", run.batch.equation(run.sizes.dp), "|", run.model.num_layers, "layers")

verified = longspan.verify(run)
print(f"largest relative error of a gradient: {verified['max_gradient_error']:.1e}")
assert verified["passed"]

summary = longspan.train(run)
print(f"loss {summary['loss']:.3f} after {summary['step']} steps")

evaluated = longspan.evaluate(run, needles=0)
for part in evaluated["positions"]:
    if part["tokens"]:
        print(f"positions {part['from']} to {part['to'] - 1}: loss {part['loss']:.3f}")
