"""Where the teacher's signal comes from."""

from megakd.teacher.online import OnlineTeacher, build_online_teacher
from megakd.teacher.protocol import Teacher

__all__ = ["OnlineTeacher", "Teacher", "build_online_teacher"]
