"""Chat templates with what the assistant says in each, worked out without any of the code under test."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Messages = list[dict[str, Any]]

EACH = "{% for m in messages %}"
CALLS = (
    "{% for c in m.tool_calls or [] %}<|call|>{{ c.function.name }} {{ c.function.arguments | tojson }}<|/call|>"
    "{% endfor %}"
)
DONE = "{% endfor %}"
SAID = "{{ m.content or '' }}" + CALLS
TURN = "<|turn|>{{ m.role }}<|body|>"
ASKED = "{% if add_generation_prompt %}<|turn|>assistant<|body|>{% endif %}"


@dataclass(frozen=True)
class Template:
    """A template and what the assistant writes in message `number` of messages, or None where nothing is written."""

    text: str
    said: Callable[[Messages, int], str | None]
    takes_calls: bool = True
    specials: bool = True
    has_header: bool = True


def calls(message: dict[str, Any]) -> str:
    return "".join(
        f"<|call|>{c['function']['name']} {json.dumps(c['function']['arguments'], ensure_ascii=False)}<|/call|>"
        for c in message.get("tool_calls") or []
    )


def _says(end: str, begin: str = "") -> Callable[[Messages, int], str]:
    return lambda messages, n: begin + (messages[n]["content"] or "") + calls(messages[n]) + end


def _is_last(messages: Messages, n: int) -> bool:
    return n == len(messages) - 1


def _thinking(messages: Messages, n: int) -> str:
    thought = messages[n].get("reasoning_content")
    return (f"<think>{thought}</think>" if thought else "") + (messages[n]["content"] or "") + "<|end|>"


def _fresh_thinking(messages: Messages, n: int) -> str:
    thought = messages[n].get("reasoning_content")
    asked = max(k for k, message in enumerate(messages) if message["role"] == "user")
    shown = f"<think>\n{thought}\n</think>\n\n" if thought and n > asked else ""
    return shown + (messages[n]["content"] or "") + calls(messages[n]) + "<|end|>"


def _quoted(messages: Messages, n: int) -> str:
    found = [
        {"name": c["function"]["name"], "arguments": c["function"]["arguments"]}
        for c in messages[n].get("tool_calls") or []
    ]
    if found:
        return f"[TOOLCALLS]{json.dumps(found, ensure_ascii=False)}</s>"
    return f" {messages[n]['content']}</s>"


TEMPLATES = {
    "marked": Template(f"{EACH}{TURN}{SAID}<|end|>{DONE}{ASKED}", _says("<|end|>")),
    "newlines": Template(
        EACH + "<|turn|>{{ m.role }}\n" + SAID + "<|end|>\n" + DONE +
        "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}",
        _says("<|end|>"),
    ),
    "header unasked": Template(
        f"{EACH}{TURN}{SAID}<|end|>{DONE}<|turn|>assistant"
        "{% if add_generation_prompt %}<|body|>{% endif %}",
        _says("<|end|>"),
    ),
    "reminder": Template(
        f"{EACH}{TURN}{SAID}<|end|>{DONE}"
        f"<|turn|>system<|body|>Be brief.<|end|>{ASKED}",
        _says("<|end|>"),
    ),
    "two ends": Template(
        f"{EACH}{TURN}{SAID}<|/body|><|end|>{DONE}{ASKED}",
        _says("<|/body|><|end|>"),
    ),
    "headers of each role": Template(
        EACH + "<|{{ m.role }}|>" + SAID + "<|end|>" + DONE +
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        _says("<|end|>"),
    ),
    "no marks of the tokenizer": Template(
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content or '' }}<|end|>\n"
        "{% else %}<|user|>\n{{ m.content }}<|end|>\n<|assistant|>\n{% endif %}{% endfor %}",
        _says("<|end|>"),
        takes_calls=False,
        specials=False,
    ),
    "ends between": Template(
        EACH + "{{ '<|end|>' if not loop.first }}" + TURN + SAID + DONE +
        "{% if add_generation_prompt and messages[-1].role != 'assistant' %}<|end|>{% endif %}"
        "{% if messages[-1].role != 'assistant' %}" + ASKED + "{% endif %}",
        lambda messages, n: _says("" if _is_last(messages, n) else "<|end|>")(messages, n),
    ),
    "thoughts": Template(
        EACH + TURN + "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
        "{{ m.content or '' }}<|end|>{% endfor %}" + ASKED,
        _thinking,
        takes_calls=False,
    ),
    "thoughts behind the last question": Template(
        "{% set ns = namespace(asked=0) %}" + EACH +
        "{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}" + DONE + EACH + "<|turn|>{{ m.role }}\n"
        "{% if m.reasoning_content and loop.index0 > ns.asked %}<think>\n{{ m.reasoning_content }}\n</think>\n\n"
        "{% endif %}" + SAID + "<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}",
        _fresh_thinking,
    ),
    "no header": Template(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
        "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]{% elif m.tool_calls %}[TOOLCALLS]["
        "{% for c in m.tool_calls %}{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}"
        "{{ ', ' if not loop.last }}{% endfor %}]{{ eos_token }}"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
        _quoted,
        has_header=False,
    ),
    "end of the text": Template(
        EACH + "<|{{ m.role }}|>\n" + SAID + "<|end|>\n" + DONE +
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        lambda messages, n: _says("<|end|>\n</s>" if _is_last(messages, n) else "<|end|>")(messages, n),
    ),
    "blocks": Template(
        EACH + TURN + "{% if m.role == 'assistant' %}{% generation %}" + SAID +
        "<|end|>{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}" + ASKED,
        _says("<|end|>"),
    ),
}  # fmt: skip
