"""The benchmarks, one short file each. TASKS is all of them by name."""

from deepseek_fp4_plugin.evaluation.task import Task
from deepseek_fp4_plugin.evaluation.tasks import (
    aime_2024,
    gpqa_diamond,
    gsm8k,
    livecodebench,
    math_500,
    mmlu_pro,
    r1_nano,
    scicode,
)

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        mmlu_pro.TASK,
        gpqa_diamond.TASK,
        livecodebench.TASK,
        scicode.TASK,
        math_500.TASK,
        aime_2024.TASK,
        gsm8k.TASK,
        r1_nano.TASK,
        r1_nano.HARD,
    )
}
