"""Where the teacher's signal comes from."""

from megakd.teacher.cached import CachedTeacher
from megakd.teacher.online import OnlineTeacher, build_online_teacher
from megakd.teacher.protocol import Teacher

__all__ = ["CachedTeacher", "OnlineTeacher", "Teacher", "build_online_teacher"]
