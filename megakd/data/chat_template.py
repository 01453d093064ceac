"""Chat templates, rendered by transformers: the tokenizer's own, or one from a file."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from megakd.common.errors import UserError
from megakd.data.records import Problem
from megakd.data.tokenizer import HuggingFaceTokenizer

if TYPE_CHECKING:
    from jinja2 import nodes

Message = dict[str, Any]
# The names under which templates read what a model thought before it answered.
REASONING = ("reasoning_content", "thinking", "reasoning")

# transformers keeps one compiled template per text, and tracks generation blocks in it.
_RENDERING = threading.Lock()
# Never in real text: the last private-use character.
_PROBE = "\U0010fffd"


class RecordError(Exception):
    """A record cannot become an example; `problem` says why."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.problem = Problem(reason, detail)
        super().__init__(str(self.problem))


class ChatTemplate:
    """One template's text with the tokenizer whose special tokens it names; may be used from several threads."""

    def __init__(self, tokenizer: HuggingFaceTokenizer, text: str) -> None:
        self.text = text
        self._tokenizer = tokenizer.transformers_tokenizer
        self.special_tokens = special_tokens(tokenizer)
        self.bos_token: str = self._tokenizer.bos_token or ""
        self.eos_token: str = self._tokenizer.eos_token or ""
        check_syntax(text)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        *,
        prompt: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation's text, with the header of the assistant's next turn where `prompt` is set.

        `arguments` are further variables of the template. Raises RecordError with the template's own message where it
        refuses the conversation.
        """
        with _RENDERING:
            try:
                text: str = self._tokenizer.apply_chat_template(
                    [_with_reasoning(message) for message in messages],
                    tools=tools,
                    chat_template=self.text,
                    add_generation_prompt=prompt,
                    tokenize=False,
                    **(arguments or {}),
                )
            except Exception as error:  # a template may do whatever an expression can do
                raise _refusal(error) from error
        return text

    def render_blocks(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, arguments: Mapping[str, Any] | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """The conversation's text and the [start, end) characters of each {% generation %} block, in order."""
        from transformers.utils.chat_template_utils import render_jinja_template

        # As apply_chat_template does before it renders.
        present = [
            {key: value for key, value in _with_reasoning(message).items() if value is not None} for message in messages
        ]
        with _RENDERING:
            try:
                texts, blocks = render_jinja_template(
                    conversations=[present],
                    tools=tools,
                    chat_template=self.text,
                    return_assistant_tokens_mask=True,
                    **{**self._tokenizer.special_tokens_map, **(arguments or {})},
                )
            except Exception as error:  # as above
                raise _refusal(error) from error
        return texts[0], [(int(start), int(end)) for start, end in blocks[0]]

    @cached_property
    def variables(self) -> frozenset[str]:
        """Names that the template reads and does not set itself."""
        from jinja2 import meta

        return frozenset(meta.find_undeclared_variables(parse(self.text)))

    @cached_property
    def has_blocks(self) -> bool:
        """Whether the template says itself, with {% generation %}, what the assistant writes."""
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.text) is not None

    @cached_property
    def has_prompt(self) -> bool:
        """Whether the template asks for add_generation_prompt at all."""
        return "add_generation_prompt" in self.text

    @cached_property
    def takes_parts(self) -> bool:
        """Whether content may be a list of {"type": "text", "text": ...} for this template.

        A template written for strings renders a list as Python shows it, or fails.
        """
        parts = [{"type": "text", "text": _PROBE}]
        try:
            text = self.render([{"role": "user", "content": parts}], None)
        except RecordError:
            return False
        if _PROBE not in text:
            return False
        try:
            plain = self.render([{"role": "user", "content": _PROBE}], None)
        except RecordError:
            return True
        return _PROBE not in plain or plain == text


@dataclass(frozen=True)
class Conversation:
    """What a template is rendered with: messages, tools, and the variables that the template reads beside them."""

    template: ChatTemplate
    messages: Sequence[Message]
    tools: Sequence[Any] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def render(self) -> str:
        """The conversation's text. Raises RecordError where the template refuses it."""
        return self.template.render(self.messages, self.tools, arguments=self.arguments)

    def try_render(self, messages: Sequence[Message], *, prompt: bool = False, tools: bool = True) -> str | None:
        """The text of other messages, or None where the template refuses them."""
        try:
            return self.template.render(
                messages, self.tools if tools else None, prompt=prompt, arguments=self.arguments
            )
        except RecordError:
            return None


def load_templates(tokenizer: HuggingFaceTokenizer, text: str | None) -> tuple[ChatTemplate, ChatTemplate]:
    """The template for conversations without and with tools: `text`, or where it is None the tokenizer's own.

    Raises UserError where the tokenizer has none, or where a template has an error.
    """
    if text is not None:
        template = ChatTemplate(tokenizer, text)
        return template, template
    own = tokenizer.transformers_tokenizer
    try:
        plain, with_tools = own.get_chat_template(None, None), own.get_chat_template(None, [{}])
    except ValueError as error:
        raise UserError(
            f"the tokenizer {tokenizer.path} has no chat template. Give one with --chat-template FILE, or the folder "
            "of a model that was trained on chats."
        ) from error
    template = ChatTemplate(tokenizer, plain)
    return template, template if with_tools == plain else ChatTemplate(tokenizer, with_tools)


def special_tokens(tokenizer: HuggingFaceTokenizer) -> tuple[str, ...]:
    """The texts of the special tokens, longest first."""
    own = tokenizer.transformers_tokenizer
    texts = {token.content for token in own.added_tokens_decoder.values() if token.special} | set(
        own.all_special_tokens
    )
    return tuple(sorted(texts - {""}, key=lambda text: (-len(text), text)))


def parse(text: str) -> nodes.Template:
    """The template's syntax tree; raises UserError where it is no jinja."""
    import jinja2
    import jinja2.ext
    from jinja2 import nodes
    from jinja2.parser import Parser

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("generation"), [], [], body).set_lineno(line)

    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    try:
        return environment.parse(text)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"the chat template has an error in line {error.lineno}: {error.message}. Correct it."
        ) from error


def check_syntax(text: str) -> None:
    """Raise UserError where a template is no jinja, or where transformers would find its blocks at wrong places."""
    from jinja2 import nodes

    tree = parse(text)
    for outer in tree.find_all((nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.AssignBlock)):
        for inner in outer.find_all(nodes.CallBlock):
            if isinstance(inner.call.node, nodes.ExtensionAttribute):
                # transformers counts the characters written before a block, and these are written later.
                raise UserError(
                    f"the chat template has {{% generation %}} in line {inner.lineno} inside a macro, call, filter or "
                    "set block, where transformers cannot say what text it covers. Move it out, or leave the tag out."
                )


def _with_reasoning(message: Message) -> Message:
    """The message with its thoughts under each name that templates read, as newer releases of transformers do it."""
    thoughts = next((message[key] for key in REASONING if message.get(key) is not None), None)
    return message if thoughts is None else {"thinking": thoughts, **message, "reasoning_content": thoughts}


def _refusal(error: Exception) -> RecordError:
    message = " ".join(str(error).split()) or "no message"
    return RecordError("refused by the chat template", f"{message[:300]} ({type(error).__name__})")
