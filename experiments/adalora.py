"""AdaLoRA against LoRA at the same final budget (Zhang et al. 2023, arXiv 2303.10512): average rank 2 at the end.

All linear layers, scaling 2 for both, each at the better of two learning rates.
"""

from common import STEPS, Experiment

from lora_kernels.methods import AdaLoRAConfig, LoRAConfig

LEARNING_RATES = {"LoRA r 2": (1.6e-3, 4e-3), "AdaLoRA 3 to 2": (4e-3, 1.2e-2)}
SEEDS = (0, 1)


def main() -> None:
    experiment = Experiment("adalora")
    methods = {
        "LoRA r 2": LoRAConfig(r=2, lora_alpha=4),
        "AdaLoRA 3 to 2": AdaLoRAConfig(init_r=3, target_r=2, lora_alpha=6, tinit=STEPS // 6, tfinal=STEPS // 3),
    }
    for seed in SEEDS:
        for name, config in methods.items():
            for lr in LEARNING_RATES[name]:
                experiment.run(f"{name}, lr {lr:g}, seed {seed}", config, lr, seed=seed)
    experiment.table()

    def draw(axes):
        for color, name in enumerate(methods):
            for seed, style in zip(SEEDS, ("-", "--"), strict=True):
                keys = [f"{name}, lr {lr:g}, seed {seed}" for lr in LEARNING_RATES[name]]
                best = min(keys, key=experiment.final)
                points = zip(*experiment.results[best]["eval"], strict=True)
                axes.plot(*points, style, marker="o", color=f"C{color}", label=best)

    experiment.plot(draw, "AdaLoRA and LoRA at one final budget", xlabel="step", ylabel="held-out loss")


if __name__ == "__main__":
    main()
