"""Templates of chats: published ones give what transformers gives, hostile ones end soon in one sentence."""

from __future__ import annotations

import json

import pytest
from helpers.checkpoints import make_word_tokenizer
from helpers.fuzz import limited

from diffusers_infogain.models.chat_templates import chat_text, read_chat_template

CHAT = [
    {"role": "system", "content": "be short"},
    {"role": "user", "content": " a red cat <think>x</think> y\n"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nthe mat"},
    {"role": "user", "content": "10000 and {0:99999d} %s"},
]

# As they are published, in short: of Llama 3, LLaDA, Qwen 2.5 and Qwen 3, with tools, namespaces, macros and filters.
ORDINARY = {
    "llama": (
        "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start|>' + message['role'] + "
        "'<|end|>\n\n'+ message['content'] | trim + '<|eot|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
        "{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
    ),
    "qwen3": (
        "{%- set ns = namespace(multi=true, last=messages|length - 1) %}{%- for message in messages[::-1] %}"
        "{%- set index = (messages|length - 1) - loop.index0 %}{%- if ns.multi and message.role == 'user' and message.content is "
        "string and not(message.content.startswith('<tool>') and message.content.endswith('</tool>')) %}{%- set ns.multi = false "
        "%}{%- set ns.last = index %}{%- endif %}{%- endfor %}{%- for message in messages %}{%- set content = message.content %}"
        "{%- if message.role == 'assistant' and '</think>' in content %}{%- set reasoning = content.split('</think>')[0]"
        ".rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}{%- set content = content.split('</think>')[-1].lstrip('\\n') %}"
        "{{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n' + content }}{%- else %}"
        "{{- '<|im_start|>' ~ message.role ~ '\\n' ~ content ~ '<|im_end|>' ~ '\\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    ),
    "tools": (
        "{% macro tool(t, indent=2) %}{{ t.name }}: {{ t | tojson(indent=indent) }}{% endmacro %}"
        "{% set date = strftime_now('%d %b %Y') "
        "%}{{ date|length > 3 }}{% for t in [{'name': 'a', 'x': [1, 2]}, {'name': 'b'}] %}{{ tool(t) }}, {% endfor %}"
        "{{ messages|map(attribute='role')|join(', ') }}{{ messages|selectattr('role', 'equalto', 'user')|list|length }}"
        "{% for a, b in messages[0].items() %}{{ a }}={{ b|upper }};{% endfor %}{% for i in range(messages|length) %}{{ i % 2 }}"
        "{% if i == 2 %}{% break %}{% endif %}{% endfor %}{{ ', '.join(['a', 'b']) }}{{ 'a-%s-%d' % ('b', 3) }}{{ '-' * 3 }}"
        "{{ '{} {}'.format(1, 'x') }}{{ messages[1].content.replace('cat', 'dog')|indent(4) }}"
        "{{ '%s' | format(messages[3].content) }}"
        "{{ bos_token }}{{ missing is defined }}{{ missing }}{% generation %}g{% endgeneration %}{{ dict(a=1).get('a') }}"
        "{{ 1700000000 | tojson }}{{ '%d' % 12345678 }}{{ 1700000000 | string }}{{ {'a': 2**3} if false else 1 }}"
    ),
}


def tokenizer_with(template: str):
    tokenizer = make_word_tokenizer(24, 20, 21)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("name", ORDINARY)
def test_published_templates_give_what_transformers_gives(name):
    tokenizer = tokenizer_with(ORDINARY[name])
    plain = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert chat_text(tokenizer, CHAT) == plain
    assert len(plain) > 50


def test_a_last_turn_is_continued():
    tokenizer = tokenizer_with(ORDINARY["llama"])
    plain = tokenizer.apply_chat_template(CHAT[:3], tokenize=False, continue_final_message=True)
    assert chat_text(tokenizer, CHAT[:3], continued=True) == plain


def test_a_last_turn_that_the_template_leaves_out_is_not_continued():
    tokenizer = tokenizer_with("{% for message in messages %}{{ message.content.split('|')[-1] }}{% endfor %}")
    assert chat_text(tokenizer, [{"role": "assistant", "content": "a|b"}]) == "b"
    with pytest.raises(ValueError, match="does not take a chat of the roles assistant: it leaves out what is to be continued"):
        chat_text(tokenizer, [{"role": "assistant", "content": "a|b"}], continued=True)


@pytest.mark.parametrize("continued", [True, False])
def test_other_templates_and_variables_give_what_transformers_gives(continued):
    template = ORDINARY["qwen3"] + "{% if not enable_thinking | default(true) %}<think></think>{% endif %}{{ n }}{{ eos_token }}"
    chat = [*CHAT[:2], {"role": "assistant", "content": "the mat "}] if continued else CHAT
    for variables in ({}, {"enable_thinking": False}, {"n": [1, {"a": None}], "eos_token": "mine"}):
        for tokenizer in (tokenizer_with("{{ 1 }}"), make_word_tokenizer(24, 20, 21)):
            before = json.dumps(variables)
            arguments = {"add_generation_prompt": not continued, "continue_final_message": continued, **variables}
            plain = tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False, **arguments)
            assert chat_text(tokenizer, chat, template=template, variables=variables, continued=continued) == plain
            assert json.dumps(variables) == before


def test_given_templates_are_bounded_and_named_too():
    with pytest.raises(ValueError, match="`messages`: `chat_template` does not take a chat of the roles system, user"), limited():
        chat_text(tokenizer_with("{{ 1 }}"), CHAT, template=HOSTILE["nested ranges"])
    with pytest.raises(ValueError, match="it makes too much text"), limited():
        chat_text(tokenizer_with("{{ 'x' * n }}"), CHAT, variables={"n": 99999999})


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        (5, "`chat_template_kwargs` must be a dictionary of variables by name, others than messages and .*, or None, got 5"),
        ({"messages": []}, "must be a dictionary of variables by name"),
        ({"a b": 1}, "must be a dictionary of variables by name"),
        ({1: 1}, "must be a dictionary of variables by name"),
        ({"a": {1, 2}}, "`chat_template_kwargs` must have values that JSON knows, got"),
        ({"a": float("nan")}, "`chat_template_kwargs` must have values that JSON knows, got"),
    ],
)
def test_variables_that_are_none_are_named(variables, text):
    with pytest.raises(ValueError, match=text):
        chat_text(tokenizer_with("{{ 1 }}"), CHAT, variables=variables)


def test_templates_are_texts_files_or_names(tmp_path):
    tokenizer = tokenizer_with("{{ 1 }}")
    (tmp_path / "t.jinja").write_text("{{ 2 }}")
    assert read_chat_template(tokenizer, "{{ 3 }}") == "{{ 3 }}"
    assert read_chat_template(tokenizer, tmp_path / "t.jinja") == "{{ 2 }}"
    assert read_chat_template(tokenizer, None) is None
    for wrong in ("t.jinja", 5, ""):
        with pytest.raises(
            ValueError, match=r"`chat_template` must be the text of a Jinja template, a pathlib\.Path of a file with"
        ):
            read_chat_template(tokenizer, wrong)
    with pytest.raises(ValueError, match=r"none\.jinja is missing"):
        read_chat_template(tokenizer, tmp_path / "none.jinja")
    tokenizer.chat_template = {"default": "{{ 1 }}", "short": "{{ 4 }}"}
    assert read_chat_template(tokenizer, "short") == "{{ 4 }}"
    with pytest.raises(ValueError, match=r"the name of one of the tokenizer's \(default, short\) or None, got 'long'"):
        read_chat_template(tokenizer, "long")


def test_long_chats_are_laid_out():
    chat = [{"role": ("user", "assistant")[i % 2], "content": "a word or two " * 300} for i in range(200)]
    for name in ("llama", "qwen3"):
        tokenizer = tokenizer_with(ORDINARY[name])
        assert chat_text(tokenizer, chat) == tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


LOOPS = "{% for a in range(100000) %}"
HOSTILE = {
    "nested ranges": LOOPS * 3 + "x" + "{% endfor %}" * 3,
    "nested ranges without text": LOOPS * 2 + "{% endfor %}" * 2,
    "nested loops over messages": "{% for a in messages %}" * 30 + "{{ messages }}" + "{% endfor %}" * 30,
    "a range of ranges": "{{ range(100000) | map('string') | map('list') | list | map('join') | list }}" * 100,
    "a long range": "{% for i in range(10 ** 10) %}x{% endfor %}",
    "long text in a loop": LOOPS + "x" * 50_000 + "{% endfor %}",
    "long text in a loop, kept": "{% set a %}" + LOOPS + "x" * 50_000 + "{% endfor %}{% endset %}",
    "long constants in a loop": LOOPS + "{{ '" + "x" * 50_000 + "' }}{% endfor %}",
    "the chat in a loop": LOOPS + "{{ messages }}{{ messages }}{% endfor %}" * 1,
    "repeated text": "{{ 'x' * 10**9 }}",
    "text repeated by a number": "{{ 'x' * 99999999999 }}",
    "text repeated from the left": "{{ 99999999999 * 'x' }}",
    "repeated lists": "{{ [0] * 99999999999 }}",
    "text repeated often": "{{ 'x' * 1000 * 1000 * 1000 * 1000 }}",
    "powers": "{{ 9 ** 9 ** 9 ** 9 }}",
    "products": "{% set x = namespace(n=3) %}" + LOOPS + "{% set x.n = x.n * x.n %}{% endfor %}",
    "doubled text": "{% set x = namespace(n='a') %}{% for i in range(60) %}{% set x.n = x.n ~ x.n %}{% endfor %}{{ x.n }}",
    "added text": "{% set x = namespace(n='a') %}{% for i in range(60) %}{% set x.n = x.n + x.n %}{% endfor %}",
    "doubled text without a loop": "{% set x = 'a' %}" + "{% set x = x ~ x %}" * 60,
    "doubled blocks": "{% set x = 'a' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60,
    "doubled lists": "{% set x = [1] %}" + "{% set x = [x, x] %}" * 60 + "{{ x }}",
    "doubled dictionaries": "{% set x = 1 %}" + "{% set x = {'a': x, 'b': x} %}" * 60 + "{{ x | tojson }}",
    "doubled dictionaries by name": "{% set x = 1 %}" + "{% set x = dict(a=x, b=x) %}" * 60 + "{{ x }}",
    "compared lists": "{% set x = [1] %}{% set y = [1] %}" + "{% set x = [x, x] %}{% set y = [y, y] %}" * 60 + "{{ x == y }}",
    "replaced text": "{% set x = 'a' %}" + "{% set x = x.replace('a', 'aaaaaaaaaa') %}" * 20,
    "replaced text by a filter": "{% set x = 'a' %}" + "{% set x = x | replace('a', 'aaaaaaaaaa') %}" * 20,
    "replaced long text": "{% set x = 'a' * 100000 %}{{ x.replace('a', x) }}",
    "joined text": "{% set x = 'a' * 100000 %}{{ x.join(x) }}",
    "joined text by a filter": "{% set x = 'a' * 100000 %}{{ x | list | join(x) }}",
    "joined defaults": "{% set x = 'a' * 100000 %}{{ range(100000) | map(attribute='q', default=x) | join }}",
    "wide formats": "{{ '%1000000000d' % 1 }}",
    "wide formats by a number": "{{ '%*d' % (1000000000, 1) }}",
    "wide formats by a filter": "{{ '%1000000000d' | format(1) }}",
    "wide fields": "{{ '{:1000000000d}'.format(1) }}",
    "wide fields by a field": "{{ '{:{}d}'.format(1, '1000000000') }}",
    "wide fields by name": "{{ ('{:1000000000d}' | attr('format'))(1) }}",
    "wide fields of a mapping": "{{ '{a:1000000000d}'.format_map({'a': 1}) }}",
    "wide lines": "{{ 'a'.center(1000000000) }}{{ 'a'.ljust(1000000000) }}",
    "wide lines by a filter": "{{ 'a' | center(1000000000) }}",
    "wide indents": "{{ ('a\n' * 1000) | indent(1000000000) }}",
    "wide JSON": "{{ [[[1]]] | tojson(indent=1000000000) }}",
    "wide tabs": "{{ ('\t' * 1000).expandtabs(100000) }}",
    "much text": "{{ lipsum(n=100000) }}",
    "bytes of a number": "{{ (1).to_bytes(1000000000, 'big') }}",
    "translated text": "{{ ('a' * 1000).translate({97: 'b' * 1000000}) }}",
    "many slices": "{{ [1] | slice(1000000000) | list }}",
    "summed lists": "{{ [[1] * 1000] * 1000 | sum(start=[]) }}",
    "a macro in itself": "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "macros in themselves": ("{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}"),
    "macros in macros": "{% macro m0() %}x{% endmacro %}"
    + "".join(f"{{% macro m{i + 1}() %}}{{{{ m{i}() }}}}{{{{ m{i}() }}}}{{% endmacro %}}" for i in range(60))
    + "{{ m60() }}",
    "calls in macros": (
        "{% macro m(n) %}{% if n %}{% call m(n - 1) %}{% endcall %}{% call m(n - 1) %}{% endcall %}"
        "{% endif %}{% endmacro %}{{ m(60) }}"
    ),
    "blocks in blocks": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "recursive loops": "{% for i in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "filters on filters": "{{ range(100000)" + " | select" * 900 + " | list }}",
    "tags within tags": "{{ ('<!--' * 100000 + '-->' * 100000) | striptags }}",
    "brackets": "{{ " + "(" * 20_000 + ")" * 20_000 + " }}",
    "signs": "{{ " + "-" * 50_000 + "1 }}",
    "blocks": "{% if true %}" * 5000 + "{% endif %}" * 5000,
    "a long template": "x" * 10**7,
    "nothing of the kind": "{% nonsense %}",
    "its own error": "{{ raise_exception('no\nsystem') }}",
    "division": "{{ 1 // 0 }}",
    "a missing thing": "{{ a.b.c }}",
    "a secret": "{{ ''.__class__.__mro__ }}{{ cycler.__init__.__globals__.os }}{{ ().__class__() }}",
    "a file": "{% include '/etc/passwd' %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_in_one_sentence(name):
    tokenizer = tokenizer_with(HOSTILE[name])
    tokenizer.name_or_path = "folder/of-the-model"
    with (
        pytest.raises(ValueError, match="`messages`: the chat template of folder/of-the-model does not take") as error,
        limited(),
    ):
        chat_text(tokenizer, CHAT)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


def test_a_tokenizer_without_a_template_is_named():
    with pytest.raises(ValueError, match=r"`messages` must be None for .*whose tokenizer has no `chat_template`"):
        chat_text(make_word_tokenizer(24, 20, 21), CHAT)


def test_what_is_never_reached_is_not_made():
    assert chat_text(tokenizer_with("{% if false %}{{ 9 ** 9 ** 9 ** 9 }}{{ 'x' * 10**12 }}{% endif %}x"), CHAT) == "x"
