"""Chat messages through templates that want text, walk over parts, or both; calls of tools; what is refused by name.
And the demo model's template."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexbatch.models.resolve import DEMO, load_tokenizer
from flexbatch.text.prompts import PromptEncoder, PromptError

GENERATION = "{% if add_generation_prompt %}[assistant]{% endif %}"
TEXT = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}" + GENERATION
PARTS = (
    "{% for m in messages %}[{{ m.role }}]"
    "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}{% endfor %}" + GENERATION
)
MACRO = (
    "{% macro say(content) %}{% if content is string %}{{ content }}{% else %}"
    "{% for p in content %}<{{ p['text'] }}>{% endfor %}{% endif %}{% endmacro -%}\n"
    "{% for m in messages %}[{{ m.role }}]{{ say(m.content) }}{% endfor %}" + GENERATION
)
JSON = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content if m.content is string else m.content | tojson }}{% endfor %}"
    + GENERATION
)
STRICT = "{% for m in messages %}[{{ m.role }}]{{ m.content.strip() + '' }}{% endfor %}" + GENERATION
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PARTS
BOTH_ROLES = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'user' and m.content is not string %}"
    "{% for p in m.content %}{{ p.text }}+{% endfor %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
FIRST_OF_SYSTEM = (
    "{% if messages[0].role == 'system' %}[system]"
    "{{ messages[0].content if messages[0].content is string else messages[0].content[0].text }}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif -%}\n"
    "{% for m in rest %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}" + GENERATION
)
"""As Gemma 3, which writes the first part alone of what the system says."""
CAPITALS = "{% for m in messages %}[{{ m.role }}]{% for p in m.content %}{{ p.text | upper }}{% endfor %}{% endfor %}"
NO_TEXTS = (
    "{% for m in messages %}{% if m.content is string %}{{ raise_exception('parts only') }}{% endif %}{% endfor %}"
    + PARTS
)
TEMPLATES = {
    "text": TEXT,
    "parts": PARTS,
    "macro": MACRO,
    "json": JSON,
    "strict": STRICT,
    "no system": NO_SYSTEM,
    "both": BOTH_ROLES,
}


encoders: dict[str, PromptEncoder] = {}


def rendered(tokenizer, template: str, messages: list) -> str:
    encoder = encoders.get(template)
    if encoder is None:
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = template
        encoder = encoders[template] = PromptEncoder(tokenizer, max_context=5000, vocab_size=400)
    return tokenizer.decode(encoder.encode(0, messages))


def parts(*texts: str) -> list[dict]:
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize("name", TEMPLATES)
def test_one_part_is_what_the_text_alone_is(tokenizer, name: str) -> None:
    for user in ("2 + 2?", "largest 漢", ""):
        plain = rendered(tokenizer, TEMPLATES[name], [{"role": "user", "content": user}])
        in_parts = rendered(tokenizer, TEMPLATES[name], [{"role": "user", "content": parts(user)}])
        assert in_parts.replace("<", "").replace(">", "").replace("+", "") == plain.replace("+", "")
        assert plain.startswith(f"[user]{user}")


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("text", "[user]a\nb"),
        ("parts", "[user]ab"),
        ("macro", "[user]<a><b>"),
        ("json", "[user]a\nb"),
        ("strict", "[user]a\nb"),
        ("both", "[user]a+b+"),
    ],
)
def test_parts_are_joined_where_the_template_wants_text_and_handed_on_where_it_walks_them(
    tokenizer, name: str, written: str
) -> None:
    assert rendered(tokenizer, TEMPLATES[name], [{"role": "user", "content": parts("a", "b")}]).startswith(written)
    told = [
        {"role": "system", "content": parts("x", "y")},
        {"role": "user", "content": "a"},
        {"role": "tool", "content": parts("1", "2")},
    ]
    assert "'text'" not in rendered(tokenizer, TEMPLATES[name], told) and '"text"' not in rendered(
        tokenizer, TEMPLATES[name], told
    )


SAID = {
    "system": [
        {"role": "system", "content": parts("s1", "s2")},
        {"role": "user", "content": "u1"},
        {"role": "assistant", "content": parts("a1", "a2")},
        {"role": "user", "content": parts("u2", "u3")},
    ],
    "tool": [
        {"role": "user", "content": "u1"},
        {"role": "assistant", "content": "a1"},
        {"role": "tool", "content": parts("t1", "t2")},
        {"role": "user", "content": parts("u2", "u3")},
    ],
    "developer": [{"role": "developer", "content": parts("d1", "d2")}, {"role": "user", "content": "u1"}],
    "text": [{"role": "system", "content": "s1"}, {"role": "user", "content": "u1"}],
}
EVERY = {**TEMPLATES, "first of system": FIRST_OF_SYSTEM, "capitals": CAPITALS, "no texts": NO_TEXTS}


@pytest.mark.parametrize("name", sorted(EVERY.keys() - {"no system"}))
@pytest.mark.parametrize("said", SAID)
def test_no_part_of_any_role_is_lost(tokenizer, name: str, said: str) -> None:
    text = rendered(tokenizer, EVERY[name], SAID[said]).lower()
    words = [
        part["text"] if isinstance(part, dict) else part
        for message in SAID[said]
        for part in ([message["content"]] if isinstance(message["content"], str) else message["content"])
    ]
    assert [text.count(word) for word in words] == [1] * len(words), text
    assert not any(mark in text for mark in ("'text'", '"text"', "'type'", '"type"'))


def test_a_refusing_template_is_the_error_of_its_prompt(tokenizer) -> None:
    assert rendered(tokenizer, NO_SYSTEM, [{"role": "user", "content": "a"}]) == "[user]a[assistant]"
    with pytest.raises(PromptError, match="prompt 0: the chat template failed: no system"):
        rendered(tokenizer, NO_SYSTEM, [{"role": "system", "content": "x"}, {"role": "user", "content": "a"}])


BAD = [
    (
        [{"type": "image_url", "image_url": {"url": "x"}}],
        "part 0 of message 1 is of type 'image_url'; the model reads text",
    ),
    ([*parts("a"), {"type": "input_audio", "input_audio": {}}], "part 1 of message 1 is of type 'input_audio'"),
    ([{"type": "text"}], 'part 0 of message 1 has no "text"'),
    ([{"type": "text", "text": 5}], 'part 0 of message 1 has no "text"'),
    ([{"text": "a"}], "part 0 of message 1 is of type None"),
    ([{"type": ["text"], "text": "a"}], r"part 0 of message 1 is of type \['text'\]"),
    ([5], "part 0 of message 1 is a int"),
    ([None], "part 0 of message 1 is a NoneType"),
    (5, "the content of message 1 is a int"),
    ({"type": "text", "text": "a"}, "the content of message 1 is a dict"),
    (b"a", "the content of message 1 is a bytes"),
    (None, 'message 1 needs "role"'),
]


@pytest.mark.parametrize(("content", "problem"), BAD, ids=range(len(BAD)))
def test_what_no_template_can_write_is_refused_by_name(tokenizer, content, problem: str) -> None:
    for template in (TEXT, PARTS):
        with pytest.raises(PromptError, match=f"^prompt 0: {problem}"):
            rendered(tokenizer, template, [{"role": "user", "content": "fine"}, {"role": "user", "content": content}])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "text", "image_url", "role", "content"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(suppress_health_check=list(HealthCheck), deadline=None, max_examples=40)
@given(message=st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "tool", "system"])}, optional={
    "content": json_values, "tool_calls": json_values, "name": json_values, "tool_call_id": json_values}))  # fmt: skip
def test_any_message_is_rendered_or_refused(tokenizer, message: dict) -> None:
    for template in (TEXT, PARTS, MACRO):
        try:
            text = rendered(tokenizer, template, [message, {"role": "user", "content": "end"}])
        except PromptError:
            continue
        assert "end" in text and "{'type'" not in text


CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
TOOLS = (
    "{% for m in messages %}[{{ m.role }}]{% if m.tool_calls %}{% for c in m.tool_calls %}"
    "{{ c.function.name }}({{ c.function.arguments.a }}){% endfor %}{% endif %}{{ m.content }}{% endfor %}" + GENERATION
)
NULL = (
    "{% for m in messages %}{% if m.role == 'assistant' and m.content is not string %}CALL"
    "{% else %}[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}" + GENERATION
)


@pytest.mark.parametrize("said", [{}, {"content": None}, {"content": ""}, {"content": []}])
def test_an_assistant_that_calls_tools_may_say_nothing(tokenizer, said: dict) -> None:
    told = [
        {"role": "user", "content": "2?"},
        {"role": "assistant", "tool_calls": [CALL], **said},
        {"role": "tool", "tool_call_id": "c1", "content": parts("3")},
    ]
    assert rendered(tokenizer, TOOLS, told) == "[user]2?[assistant]add(2)[tool]3[assistant]"
    assert rendered(tokenizer, TOOLS, told[:2]) == "[user]2?[assistant]add(2)[assistant]", (
        "a call is answered, not continued"
    )
    if said.get("content") is None:
        assert rendered(tokenizer, NULL, told) == "[user]2?CALL[tool]3[assistant]"
    with pytest.raises(PromptError, match="the arguments of a tool call in message 1 are not JSON"):
        broken = {**CALL, "function": {"name": "add", "arguments": "{"}}
        rendered(tokenizer, TOOLS, [told[0], {**told[1], "tool_calls": [broken]}])


def test_a_last_text_of_the_assistant_is_continued_in_parts_too(tokenizer) -> None:
    for template in (TEXT, PARTS):
        assert (
            rendered(
                tokenizer,
                template,
                [{"role": "user", "content": "a"}, {"role": "assistant", "content": parts("It is")}],
            )
            == "[user]a[assistant]It is"
        )


def test_the_demo_model_has_a_template_that_is_code() -> None:
    tokenizer = load_tokenizer(DEMO)
    encoder = PromptEncoder(tokenizer, max_context=2048, vocab_size=4096)
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": parts("Add two numbers.", "Name it add.")},
    ]
    told = tokenizer.decode(encoder.encode(0, chat))
    assert told == "# system:\n# Be brief.\n\n# user:\n# Add two numbers.\n# Name it add.\n\n# assistant:\n"
    compile(told, "chat", "exec")
    begun = tokenizer.decode(encoder.encode(0, [*chat, {"role": "assistant", "content": "def add(a, b):"}]))
    assert begun == told + "def add(a, b):"
    answered = [
        *chat,
        {"role": "assistant", "content": "def add(a, b): ..."},
        {"role": "user", "content": "Now\nsubtract."},
    ]
    assert (
        tokenizer.decode(encoder.encode(0, answered))
        == told + "def add(a, b): ...\n\n# user:\n# Now\n# subtract.\n\n# assistant:\n"
    )


def test_the_training_script_writes_the_template() -> None:
    from benchmark.demo_template import CHAT_TEMPLATE

    for folder in (DEMO, Path(DEMO).with_name("demo-draft")):
        assert (folder / "chat_template.jinja").read_text(encoding="utf-8") == CHAT_TEMPLATE
