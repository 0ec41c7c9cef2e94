"""Where LoRA is placed, at an equal number of parameters (Hu et al. 2022, section 7.1, compare attention weights only).

r is chosen so that each placement has 30 · 9,216 parameters, as nearly as the shapes allow; lora_alpha = 2 r.
"""

from common import Experiment

from lora_kernels.methods import LoRAConfig

PLACEMENTS = {
    "q8": {"q_proj": 8},
    "k12": {"k_proj": 12},
    "v12": {"v_proj": 12},
    "o8": {"o_proj": 8},
    "q4 k6": {"q_proj": 4, "k_proj": 6},
    "q4 v6": {"q_proj": 4, "v_proj": 6},
    "v6 o4": {"v_proj": 6, "o_proj": 4},
    "q2 k3 v3 o2": {"q_proj": 2, "k_proj": 3, "v_proj": 3, "o_proj": 2},
    "up2 down2": {"up_proj": 2, "down_proj": 2},
    "all 1": dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), 1),
}
SEEDS = (0,)


def main() -> None:
    experiment = Experiment("placement")
    for seed in SEEDS:
        for name, ranks in PLACEMENTS.items():
            config = LoRAConfig(
                target_modules=list(ranks),
                rank_pattern=ranks,
                alpha_pattern={module: 2 * r for module, r in ranks.items()},
            )
            experiment.run(f"{name}, seed {seed}", config, lr=1.6e-3, seed=seed)
    experiment.table()

    def draw(axes):
        order = sorted(PLACEMENTS, key=lambda name: -experiment.final(f"{name}, seed 0"))
        for seed in SEEDS:
            axes.plot([experiment.final(f"{name}, seed {seed}") for name in order], order, "o", label=f"seed {seed}")

    experiment.plot(draw, "Equal parameters, different places", xlabel="held-out loss at the end")


if __name__ == "__main__":
    main()
