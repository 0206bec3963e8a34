"""The tasks of the comparison, by name and tier."""

from examples.compare import digits_tasks, fine_tuning, language, mnist, mnist1d, tabular
from examples.compare.task import Task

TASKS: dict[str, Task] = {
    **digits_tasks.TASKS,
    **mnist1d.TASKS,
    **tabular.TASKS,
    **mnist.TASKS,
    **language.TASKS,
    **fine_tuning.TASKS,
}
