"""Where the teacher's signal comes from."""

from megakd.teacher.cached import CachedTeacher
from megakd.teacher.dedicated import RemoteTeacher, TeacherServer
from megakd.teacher.online import OnlineTeacher
from megakd.teacher.protocol import DenseTeacher, Teacher
from megakd.teacher.stage import TeacherStage, build_teacher_stage

__all__ = [
    "CachedTeacher",
    "DenseTeacher",
    "OnlineTeacher",
    "RemoteTeacher",
    "Teacher",
    "TeacherServer",
    "TeacherStage",
    "build_teacher_stage",
]
