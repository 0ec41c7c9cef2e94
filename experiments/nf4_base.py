"""LoRA over NF4 against LoRA over the weights as they are (Dettmers et al. 2023, section 4: no loss of quality).

All linear layers, r = 16. The model's weights come from a 4-bit file, so that NF4's rounding of them says little about
NF4's rounding of the original ones: compare the runs with each other only.
"""

from common import Experiment

from lora_kernels.methods import LoRAConfig

BASES = {"float32": {}, "NF4": {"quantize": "nf4"}, "NF4, double": {"quantize": "nf4", "double_quant": True}}
SEEDS = (0, 1)


def main() -> None:
    experiment = Experiment("nf4_base")
    config = LoRAConfig(r=16, lora_alpha=32)
    for seed in SEEDS:
        for name, base in BASES.items():
            experiment.run(f"{name}, seed {seed}", config, lr=8e-4, seed=seed, **base)
    experiment.table()

    def draw(axes):
        for color, name in enumerate(BASES):
            for seed, style in zip(SEEDS, ("-", "--"), strict=True):
                run = experiment.results[f"{name}, seed {seed}"]
                points = zip(*run["eval"], strict=True)
                axes.plot(*points, style, marker="o", color=f"C{color}", label=f"{name}, seed {seed}")

    experiment.plot(draw, "The base in NF4", xlabel="step", ylabel="held-out loss")


if __name__ == "__main__":
    main()
