"""The tasks of the comparison, by name and tier."""

from examples.compare import digits_tasks
from examples.compare.task import Task

TASKS: dict[str, Task] = {**digits_tasks.TASKS}
