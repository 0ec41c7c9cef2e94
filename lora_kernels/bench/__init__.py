"""What does LoRA cost? `lora-kernels bench`: every op and whole training steps beside their peers and their floors.

A suite yields cases: one piece of work, and the contenders that do it. They run interleaved in one process, in a new
random order every round, or, where memory counts or a contender needs a library's own loop, each in a process of its
own that is told when to step. See docs/performance.md for what was learnt with it.
"""
