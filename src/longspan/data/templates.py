"""Chat templates by name, for tokenizers without a template.

They were written for this package after the formats with which their models were trained. A model with
a template of its own keeps it (chat_template: tokenizer_default), because it may support tools and more.
"""

from __future__ import annotations

_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_QWEN = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}"
    "{% endif %}" + _CHATML
)

# Qwen's text before the tools of a chat, in the words with which its models were trained.
_QWEN_TOOLS = (
    "{{ '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n"
    "You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' }}"
    "{% for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}"
    "{{ '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\\n<tool_call>\\n"
    '{"name": <function-name>, "arguments": <args-json-object>}'
    "\\n</tool_call>' }}"
)

# A call inside an answer: {"name": ..., "arguments": ...}. The data may wrap it in "function".
_QWEN_CALL = (
    "{% set call = call.function or call %}"
    '{{ \'<tool_call>\\n{"name": "\' + call.name + \'", "arguments": \' }}'
    "{% set arguments = {} if call.arguments is undefined or call.arguments is none else call.arguments %}"
    "{{ arguments if arguments is string else arguments | tojson }}"
    "{{ '}\\n</tool_call>' }}"
)

# Results of calls, which belong to the user's role; consecutive results are one turn.
_QWEN_RESULT = (
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}"
)

_QWEN_25 = (
    "{% set given = messages[0].role == 'system' %}"
    "{{ '<|im_start|>system\\n' }}"
    "{{ messages[0].content if given else 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' }}"
    "{% if tools %}{{ '\\n\\n' }}" + _QWEN_TOOLS + "{% endif %}"
    "{{ '<|im_end|>\\n' }}"
    "{% for message in messages %}"
    "{% if message.role == 'tool' %}" + _QWEN_RESULT + "{% elif not (loop.first and given) %}"
    "{{ '<|im_start|>' + message.role }}"
    "{% if message.content or not message.tool_calls %}{{ '\\n' + message.content }}{% endif %}"
    "{% for call in message.tool_calls or [] %}{{ '\\n' }}" + _QWEN_CALL + "{% endfor %}"
    "{{ '<|im_end|>\\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Thoughts are written only in the turns after the last question; the last turn always has a place for them.
_QWEN3 = (
    "{% set ns = namespace(question=-1) %}"
    "{% for message in messages %}{% if message.role == 'user' %}{% set ns.question = loop.index0 %}{% endif %}{% endfor %}"
    "{% set given = messages[0].role == 'system' %}"
    "{% if tools %}{{ '<|im_start|>system\\n' + (messages[0].content + '\\n\\n' if given else '') }}"
    + _QWEN_TOOLS
    + "{{ '<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message.role == 'tool' %}" + _QWEN_RESULT + "{% elif not (loop.first and given and tools) %}"
    "{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% set content = message.content %}"
    "{% if message.role == 'assistant' %}"
    "{% set thought = message.reasoning_content or '' %}"
    "{% if not thought and '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1] %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}"
    "{% endif %}"
    "{% if loop.index0 > ns.question and (loop.last or thought) %}"
    "{{ '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}{% set content = content.lstrip('\\n') %}"
    "{% endif %}"
    "{% endif %}"
    "{{ content }}"
    "{% for call in message.tool_calls or [] %}"
    "{% if content or not loop.first %}{{ '\\n' }}{% endif %}" + _QWEN_CALL + "{% endfor %}"
    "{{ '<|im_end|>\\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)

_LLAMA3 = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)

# The text of a system message is put before the first question, inside the question's brackets.
_MISTRAL = (
    "{{ bos_token }}"
    "{% set ns = namespace(system='') %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set ns.system = message['content'] + '\\n\\n' %}"
    "{% elif message['role'] == 'user' %}{{ '[INST] ' + ns.system + message['content'] + ' [/INST]' }}"
    "{% set ns.system = '' %}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('no role ' + message['role'] + ' in this format') }}{% endif %}"
    "{% endfor %}"
)

_GEMMA = (
    "{{ bos_token }}"
    "{% set ns = namespace(system='') %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set ns.system = message['content'] | trim + '\\n\\n' %}"
    "{% else %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}"
    "{{ ns.system + message['content'] | trim + '<end_of_turn>\\n' }}"
    "{% set ns.system = '' %}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)

_PHI_3 = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)

# The Alpaca prompt for chats: each answer ends with the tokenizer's own end token.
_ALPACA = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}"
    "{% else %}{{ raise_exception('no role ' + message['role'] + ' in this format') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)

TEMPLATES = {
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "gemma": _GEMMA,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
    "mistral_v1": _MISTRAL,
    "phi_3": _PHI_3,
    "qwen": _QWEN,
    "qwen_25": _QWEN_25,
    "qwen3": _QWEN3,
}

#: The bundled templates that write tools and tool calls.
WITH_CALLS = ("qwen3", "qwen_25")
