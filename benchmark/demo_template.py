"""The chat template of the demo model."""

CHAT_TEMPLATE = (
    "{#- The model knows Python files alone, so a conversation is one: what is said to it are comments. -#}"
    r"""
{%- for message in messages -%}
    {%- if message['content'] is string -%}
        {%- set said = message['content'] -%}
    {%- else -%}
        {%- set said = message['content'] | map(attribute='text') | join('\n') -%}
    {%- endif -%}
    {%- if message['role'] == 'assistant' -%}
        {{- '# assistant:\n' + said + ('' if loop.last else '\n\n') -}}
    {%- else -%}
        {{- '# ' + message['role'] + ':\n# ' + said | replace('\n', '\n# ') + '\n\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '# assistant:\n' -}}
{%- endif -%}
"""
)
