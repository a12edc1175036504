"""Chat templates with the habits of real ones, and a tokenizer that has their special tokens."""

import transformers
from tokenizers import AddedToken

from support.tiny import make_tokenizer

# Each turn between tags; what the content says is not changed
CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

# A BOS of its own, always a system turn, with the day; contents are trimmed; tools in the system turn
LLAMA = """\
{{- bos_token }}
{%- set system = '' %}
{%- if messages and messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- '<|head|>system<|/head|>\n\nToday Date: ' + strftime_now('%d %b %Y') + '\n\n' + system }}
{%- if tools is not none %}{{- 'Tools: ' + tools | tojson }}{%- endif %}
{{- '<|eot|>' }}
{%- for message in messages %}
    {{- '<|head|>' + message.role + '<|/head|>\n\n' }}
    {%- if message.tool_calls is defined %}
        {%- for call in message.tool_calls %}{{- call.function | tojson }}{%- endfor %}
    {%- endif %}
    {{- message.content | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|head|>assistant<|/head|>\n\n' }}{%- endif %}"""

# Only the turns behind the last question keep what was thought; the last one has a thought even if it is empty
QWEN = """\
{%- set ns = namespace(asked=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set ns.asked = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set thought, said = '', message.content %}
    {%- if message.role == 'assistant' and '</think>' in said %}
        {%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}
        {%- set said = said.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>' + ('user' if message.role == 'tool' else message.role) + '\n' }}
    {%- if message.role == 'assistant' and loop.index0 > ns.asked and (loop.last or thought) %}
        {{- '<think>\n' + thought + '\n</think>\n\n' }}
    {%- endif %}
    {{- said + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}"""

# No system turn, other names of roles, which must take turns
GEMMA = """\
{{- bos_token }}
{%- set ns = namespace(before='') %}
{%- if messages and messages[0].role == 'system' %}
    {%- set ns.before = messages[0].content + '\n\n' %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate') }}
    {%- endif %}
    {{- '<|turn|>' + ('model' if message.role == 'assistant' else 'user') + '\n' }}
    {{- (ns.before if loop.first else '') + message.content | trim + '<|/turn|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|turn|>model\n' }}{%- endif %}"""

# No generation prompt; EOS ends a turn; a system message goes into the user's turn if that is the last
MISTRAL = """\
{{- bos_token }}
{%- set ns = namespace(system='') %}
{%- if messages[0].role == 'system' %}
    {%- set ns.system = messages[0].content + '\n\n' %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' + (ns.system if loop.last else '') + message.content + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message.content + eos_token }}
    {%- endif %}
{%- endfor %}"""

# EOS ends a text in which nothing is asked, whoever spoke last
PHI = """\
{%- for message in messages %}
    {{- '<|turn|>' + message.role + '\n' + message.content + '<|/turn|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|turn|>assistant\n' }}{%- else %}{{- eos_token }}{%- endif %}"""

# Says itself what is trained: of the assistant's turns, but not of a tool call
TAGGED = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message.content + '<|im_end|>' }}{%- endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

# Words and line breaks alone: no token ends a turn
PLAIN = """\
{%- for message in messages %}{{- message.role + ': ' + message.content + '\n\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- 'assistant:' }}{%- endif %}"""

SPECIAL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|head|>",
    "<|/head|>",
    "<|eot|>",
    "<|turn|>",
    "<|/turn|>",
    "[INST]",
    "[/INST]",
]
ADDED = ["<think>", "</think>"]  # not special


def chat_tokenizer(template=None, bos=True):
    """The tests' byte-level tokenizer, which puts BOS before a text, with the templates' tokens."""
    tokenizer = make_tokenizer(bos)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in ADDED])
    tokenizer.chat_template = template
    return tokenizer


class SlowTokenizer(transformers.PreTrainedTokenizer):
    """A tokenizer in Python, a token a character, without offsets; added tokens are whole."""

    def __init__(self, **settings):
        self.characters = {"<bos>": 0, "<eos>": 1} | {chr(code): code for code in range(2, 256)}
        super().__init__(bos_token="<bos>", eos_token="<eos>", **settings)

    @property
    def vocab_size(self):
        return len(self.characters)

    def get_vocab(self):
        return self.characters | self.added_tokens_encoder

    def _tokenize(self, text, **_):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.characters[token]

    def _convert_id_to_token(self, index):
        return next(token for token, k in self.characters.items() if k == index)

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)
