"""The four ways to start lora_a and lora_b: gradient norms at the first step, and what training makes of them.

Hu et al. 2022, section 4.1, start A random and B zero; Hayou et al. 2024 (arXiv 2406.08447) compare it with the other
way round. q and v, r = 8, each start at the better of two learning rates.
"""

from common import Experiment, adapted, gradient_norms

from lora_kernels.methods import LoRAConfig

STARTS = {
    "A random, B zero": "default",
    "A zero, B gaussian": "b_gaussian",
    "both gaussian": "both_gaussian",
    "both zero": "both_zero",
}
LEARNING_RATES = (4e-4, 1.6e-3)


def main() -> None:
    experiment = Experiment("initialisation")
    for title, init in STARTS.items():
        config = LoRAConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], init=init)
        if (key := f"{title}, gradients") not in experiment.results:
            a, b = gradient_norms(adapted(config, seed=0))
            experiment.keep(key, {"lora_a": a, "lora_b": b})
        for lr in LEARNING_RATES:
            experiment.run(f"{title}, lr {lr:g}", config, lr)

    best = {title: min((f"{title}, lr {lr:g}" for lr in LEARNING_RATES), key=experiment.final) for title in STARTS}
    print("| start | ‖dA‖ at step 1 | ‖dB‖ at step 1 | held-out loss at step 0 | at the end (best lr) |")
    print("|---|---|---|---|---|")
    for title in STARTS:
        norms, run = experiment.results[f"{title}, gradients"], experiment.results[best[title]]
        print(f"| {title} | {norms['lora_a']:.3g} | {norms['lora_b']:.3g} ", end="")
        print(f"| {run['eval'][0][1]:.3f} | {run['eval'][-1][1]:.3f} ({run['lr']:g}) |")

    def draw(axes):
        for title in STARTS:
            axes.plot(*zip(*experiment.results[best[title]]["eval"], strict=True), marker="o", label=best[title])

    experiment.plot(draw, "How A and B start", xlabel="step", ylabel="held-out loss")


if __name__ == "__main__":
    main()
