"""LoRA+ against LoRA over learning rates (Hayou et al. 2024, arXiv 2402.12354): never without the sweep.

q and v, r = 8. Ratio 1 is LoRA.
"""

from common import Experiment

from lora_kernels.methods import LoRAConfig

LEARNING_RATES = {
    1: (4e-4, 1.6e-3, 3.2e-3, 6.4e-3, 1.28e-2),
    4: (4e-4, 8e-4, 1.6e-3, 3.2e-3, 6.4e-3, 1.28e-2),
    16: (1e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3, 6.4e-3),
}


def main() -> None:
    experiment = Experiment("loraplus")
    config = LoRAConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    for ratio, rates in LEARNING_RATES.items():
        for lr in rates:
            experiment.run(f"ratio {ratio}, lr {lr:g}", config, lr, optimizer="loraplus", lr_ratio=float(ratio))
    experiment.table()

    def draw(axes):
        for ratio, rates in LEARNING_RATES.items():
            losses = [experiment.final(f"ratio {ratio}, lr {lr:g}") for lr in rates]
            axes.plot(rates, losses, marker="o", label=f"ratio {ratio}")
        axes.set_xscale("log")

    experiment.plot(draw, "LoRA+ and LoRA", xlabel="learning rate of A", ylabel="held-out loss at the end")


if __name__ == "__main__":
    main()
