"""Rank 1 to 64 on q and v: lora_alpha fixed, lora_alpha fixed with rsLoRA, and lora_alpha = 2 r.

Hu et al. 2022, section 7.2, find that the rank hardly matters; Kalajdzievski 2023 (arXiv 2312.03732) that with
scaling = lora_alpha / r a large rank learns more slowly, and with lora_alpha / sqrt(r) it does not.
"""

from common import Experiment

from lora_kernels.methods import LoRAConfig

RANKS = (1, 4, 16, 64)
SCALINGS = {
    "alpha 16": lambda r: {"lora_alpha": 16},
    "alpha 16, rsLoRA": lambda r: {"lora_alpha": 16, "use_rslora": True},
    "alpha 2r": lambda r: {"lora_alpha": 2 * r},
}


def main() -> None:
    experiment = Experiment("rank")
    for r in RANKS:
        for name, scaling in SCALINGS.items():
            config = LoRAConfig(r=r, target_modules=["q_proj", "v_proj"], **scaling(r))
            experiment.run(f"r {r}, {name}", config, lr=8e-4)
    experiment.table()

    def draw(axes):
        for name in SCALINGS:
            axes.plot(RANKS, [experiment.final(f"r {r}, {name}") for r in RANKS], marker="o", label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(RANKS, map(str, RANKS))

    experiment.plot(draw, "Rank and scaling", xlabel="rank", ylabel="held-out loss at the end")


if __name__ == "__main__":
    main()
