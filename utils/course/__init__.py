"""Everything that handles notebooks: build, run, check, execute, collect, grade.

`python -m utils.course` lists the commands.
"""


class CourseError(Exception):
    """Something the author, teacher or reader can mend; its text is the sentence they read."""
