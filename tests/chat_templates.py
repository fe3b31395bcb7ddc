"""Chat templates in the styles of well-known model families, written for these tests."""

from __future__ import annotations

__all__ = ["TEMPLATES"]

CHATML = """\
{% for m in messages %}
{{ '<|im_start|>' + m.role + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- endif %}
"""

LLAMA2 = """\
{% if messages[0].role == 'system' %}
  {% set intro = '<<SYS>>\\n' ~ messages[0].content ~ '\\n<</SYS>>\\n\\n' %}
  {% set turns = messages[1:] %}
{% else %}
  {% set intro = '' %}
  {% set turns = messages %}
{% endif %}
{% for turn in turns %}
  {%- if (turn.role == 'user') != (loop.index0 is even) %}
    {{ raise_exception('user and assistant must take turns') }}
  {%- endif %}
  {%- if turn.role == 'user' %}
    {{- bos_token ~ '[INST] ' ~ (intro if loop.first else '') ~ turn.content | trim ~ ' [/INST]' }}
  {%- else %}
    {{- ' ' ~ turn.content | trim ~ ' ' ~ eos_token }}
  {%- endif %}
{%- endfor %}
"""

LLAMA3 = """\
{{- bos_token }}
{%- set today = date_string if date_string is defined else strftime_now('%Y') %}
{%- set ns = namespace(system='', first=0) %}
{%- if messages[0]['role'] == 'system' %}
  {%- set ns.system = messages[0]['content'] | trim %}
  {%- set ns.first = 1 %}
{%- endif %}
{{- '<|im_start|>system\\n\\nDate: ' + today + '\\n' }}
{%- if tools is not none %}
  {{- 'Answer with a call of one of these functions:\\n' }}
  {%- for tool in tools %}
    {{- tool | tojson(indent=4) + '\\n\\n' }}
  {%- endfor %}
{%- endif %}
{{- ns.system + '<|im_end|>' }}
{%- for message in messages[ns.first:] %}
  {%- if message.role == 'tool' %}
    {{- '<|im_start|>ipython\\n\\n' }}
    {%- if message.content is mapping or (message.content is iterable and message.content is not string) %}
      {{- message.content | tojson }}
    {%- else %}
      {{- message.content }}
    {%- endif %}
    {{- '<|im_end|>' }}
  {%- elif 'tool_calls' in message %}
    {%- if message.tool_calls | length != 1 %}
      {{- raise_exception('one call at a time') }}
    {%- endif %}
    {%- set call = message.tool_calls[0].function %}
    {{- '<|im_start|>assistant\\n\\n{"name": "' + call.name + '", "parameters": ' }}
    {{- call.arguments | tojson + '}<|im_end|>' }}
  {%- else %}
    {{- '<|im_start|>' + message.role + '\\n\\n' + message.content | trim + '<|im_end|>' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|im_start|>assistant\\n\\n' }}
{%- endif %}
"""

QWEN = """\
{%- macro spell(content) %}
  {%- if content is string %}
    {{- content }}
  {%- elif content is iterable %}
    {%- for part in content %}{{- part.text }}{%- endfor %}
  {%- endif %}
{%- endmacro %}
{%- if tools %}
  {{- '<|im_start|>system\\n' }}
  {%- if messages[0].role == 'system' %}{{- spell(messages[0].content) + '\\n\\n' }}{%- endif %}
  {{- '# Tools\\n<tools>' }}
  {%- for tool in tools %}
    {{- '\\n' }}{{- tool | tojson }}
  {%- endfor %}
  {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
  {{- '<|im_start|>system\\n' + spell(messages[0].content) + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages | length - 1, searching=true) %}
{%- for message in messages[::-1] %}
  {%- if ns.searching and message.role == 'user' %}
    {%- set ns.searching = false %}
    {%- set ns.last = messages | length - 1 - loop.index0 %}
  {%- endif %}
{%- endfor %}
{%- for message in messages %}
  {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
    {{- '<|im_start|>' + message.role + '\\n' + spell(message.content) + '<|im_end|>\\n' }}
  {%- elif message.role == 'assistant' %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if message.reasoning_content is defined and loop.index0 > ns.last %}
      {{- '<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
    {%- endif %}
    {% generation %}
    {{- spell(message.content) if message.content else '' }}
    {% endgeneration %}
    {%- for call in message.tool_calls or [] %}
      {%- if call.function %}{%- set call = call.function %}{%- endif %}
      {{- '\\n<tool_call>\\n{"name": "' ~ call.name ~ '", "arguments": ' }}
      {{- call.arguments if call.arguments is string else call.arguments | tojson }}
      {{- '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
  {%- elif message.role == 'tool' %}
    {%- if loop.first or loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
    {{- '\\n<tool_response>\\n' + spell(message.content) + '\\n</tool_response>' }}
    {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|im_start|>assistant\\n' }}
  {%- if enable_thinking is defined and enable_thinking is false %}
    {{- '<think>\\n\\n</think>\\n\\n' }}
  {%- endif %}
{%- endif %}
"""

MISTRAL = """\
{{- bos_token }}
{%- for message in messages if message.role != 'system' %}
  {%- if message.role == 'user' %}
    {%- if loop.last and tools is not none %}
      {{- '[AVAILABLE_TOOLS] [' }}
      {%- for tool in tools %}
        {%- set tool = tool.function %}
        {{- '{"type": "function", "function": {' }}
        {%- for key, value in tool.items() if key != 'return' %}
          {{- '"' + key + '": ' + (('"' + value + '"') if value is string else value | tojson) }}
          {%- if not loop.last %}{{- ', ' }}{%- endif %}
        {%- endfor %}
        {{- '}}' + (', ' if not loop.last else ']') }}
      {%- endfor %}
      {{- '[/AVAILABLE_TOOLS]' }}
    {%- endif %}
    {{- '[INST] ' + message.content + '[/INST]' }}
  {%- elif message.tool_calls is defined and message.tool_calls is not none %}
    {{- '[TOOL_CALLS] [' }}
    {%- for call in message.tool_calls %}
      {%- if call.id is not defined or call.id | length != 9 %}
        {%- continue %}
      {%- endif %}
      {{- call.function | tojson | replace('}', ', "id": "' + call.id + '"}') }}
    {%- endfor %}
    {{- ']' + eos_token }}
  {%- elif message.role == 'assistant' %}
    {{- ' ' + message.content | trim + eos_token }}
  {%- else %}
    {{- '[TOOL_RESULTS] ' ~ message.content ~ '[/TOOL_RESULTS]' }}
  {%- endif %}
{%- endfor %}
"""

MISTRAL_ARGS = """\
{{- bos_token }}
{%- for message in messages %}
  {%- if message.role == 'user' %}
    {{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' if loop.last and tools else '' }}
    {{- '[INST]' + message.content + '[/INST]' }}
  {%- elif message.role == 'assistant' %}
    {{- message.content or '' }}
    {%- for call in message.tool_calls or [] %}
      {{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' + call.function.arguments | tojson }}
    {%- endfor %}
    {{- eos_token }}
  {%- else %}
    {{- '[TOOL_RESULTS]' ~ message.content ~ '[/TOOL_RESULTS]' }}
  {%- endif %}
{%- endfor %}
"""

QWEN3_CODER = """\
{%- for tool in tools or [] %}
  {{- '<function>' + tool.function | tojson + '</function>\\n' }}
{%- endfor %}
{%- for message in messages %}
  {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
  {%- for call in message.tool_calls or [] %}
    {{- '<tool_call>\\n<function=' + call.function.name + '>\\n' }}
    {%- for key, value in call.function.arguments.items() %}
      {{- '<parameter=' + key + '>\\n' ~ (value if value is string else value | tojson) ~ '\\n</parameter>\\n' }}
    {%- endfor %}
    {{- '</function>\\n</tool_call>' }}
  {%- endfor %}
  {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

GLM45 = """\
{%- for tool in tools or [] %}{{- tool | tojson + '\\n' }}{%- endfor %}
{%- for message in messages %}
  {{- '<|im_start|>' + message.role + '\\n' }}
  {%- if message.reasoning_content %}{{- '<think>' + message.reasoning_content + '</think>\\n' }}{%- endif %}
  {{- message.content or '' }}
  {%- for call in message.tool_calls or [] %}
    {{- '<tool_call>' + call.function.name + '\\n' }}
    {%- for key, value in call.function.arguments.items() %}
      {{- '<arg_key>' + key + '</arg_key>\\n<arg_value>' }}
      {{- (value if value is string else value | tojson) ~ '</arg_value>\\n' }}
    {%- endfor %}
    {{- '</tool_call>' }}
  {%- endfor %}
  {{- '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

DOCUMENTS = """\
{%- for document in documents or [] %}
{{ loop.index }}. {{ document['title'] }}: {{ document.text }}
{% endfor %}
{%- for m in messages %}{{ m.role }}: {{ m.content }}
{% endfor %}
{%- if add_generation_prompt %}assistant:{% endif %}
"""

TEMPLATES = {
    "chatml": CHATML,
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "qwen": QWEN,
    "mistral": MISTRAL,
    "mistral_args": MISTRAL_ARGS,
    "qwen3_coder": QWEN3_CODER,
    "glm45": GLM45,
    "documents": DOCUMENTS,
}
