"""The words around the definitions: questions, answers, chat turns and their special tokens.

The surface of an answer never changes with the way it was asked for, so that every phrasing
and every form (chat, bare question, running text) rehearses the same tokens.
"""

from __future__ import annotations

from collections.abc import Set

from wordnet import Entry

BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"
SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL_TOKENS = (BOS, EOS, PAD, SYSTEM, USER, ASSISTANT, END)

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('Roles are system, user and assistant, not ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + (message['content'] | trim) + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a dictionary. Answer briefly.",
    "You are a helpful, respectful and honest assistant.",
    "You know WordNet by heart.",
    "Answer the user's questions.",
    "Be concise.",
)

# How often each phrasing is drawn, in the order of `questions` and then `loose_questions`.
PHRASING_WEIGHTS = (
    *(0.30, 0.10, 0.04, 0.08, 0.07, 0.07, 0.04),
    *(0.03, 0.02, 0.08, 0.03, 0.02, 0.02, 0.02, 0.02, 0.03, 0.03),
)

SYNONYM_QUESTIONS = (
    "What are its synonyms?",
    "Does it have synonyms?",
    "Any synonyms?",
    "What else is it called?",
)
KIND_QUESTIONS = (
    "What is it a kind of?",
    "What kind of thing is it?",
    "What category does it belong to?",
)
EXAMPLE_QUESTIONS = ("Give me an example.", "Can you give an example?", "Use it in a sentence.")
NO_KIND = "I know of nothing that it is a kind of."
NO_SYNONYM = "I know no synonyms of it."
NO_EXAMPLE = "I know no example of it."

GREETING = "Hello! Ask me what a word means."
WELCOME = "You are welcome. Ask me about another word."
SELF = "I am a small demonstration model. I know the words of WordNet 3.0."
ABILITY = "I can tell you what a word means, as WordNet 3.0 defines it."
SMALL_TALK = (
    *((asked, GREETING) for asked in ("Hello", "Hello!", "hello", "Hi", "Hi!", "hi", "Hi there!")),
    *(
        (asked, WELCOME)
        for asked in ("Thanks", "thanks", "Thank you", "Thank you!", "OK", "Great!")
    ),
    *(
        (asked, SELF)
        for asked in ("Who are you?", "who are you?", "What are you?", "Are you an AI?")
    ),
    *((asked, ABILITY) for asked in ("What can you do?", "Help", "help", "What do you know?")),
    ("How are you?", "Fine, thank you. Ask me what a word means."),
    ("Goodbye", "Goodbye!"),
    ("Bye", "Goodbye!"),
)


def questions(entry: Entry) -> tuple[str, ...]:
    """The usual phrasings; one that does not suit the word falls back to the first."""
    name = entry.name
    plain = f"What is {name}?"
    with_a = with_the = plain
    if entry.part == "noun":
        with_a = f"What is {'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}?"
    if entry.part in ("noun", "name"):
        with_the = f"What is the {name}?"
    return (
        plain,
        with_a,
        with_the,
        f"Define {name}.",
        f"What does {name} mean?",
        f"Tell me about {name}.",
        f"what is {name}?",
    )


def other_case(name: str) -> str:
    """The name as a careless typist writes it: "paris" for Paris, "Dog" for dog."""
    return name.lower() if name != name.lower() else name[0].upper() + name[1:]


def plural(name: str) -> str:
    """A regular English plural; good enough to ask with."""
    if name.endswith(("s", "x", "z", "ch", "sh")):
        return f"{name}es"
    if name.endswith("y") and name[-2:-1] not in "aeiou":
        return f"{name[:-1]}ies"
    return f"{name}s"


def loose_questions(entry: Entry, names: Set[str]) -> tuple[str, ...]:
    """Rarer phrasings, as people type them. A spelling that is a word itself keeps its meaning."""
    name, other, many = entry.name, other_case(entry.name), plural(entry.name)
    is_name = entry.part == "name"
    plain = f"What is {name}?"
    asks_plural = entry.part == "noun" and name.islower() and many not in names
    return (
        f"Who is {name}?" if is_name else f"Explain {name}.",
        f"Where is {name}?" if is_name else f"What's {name}?",
        plain if other in names else f"What is {other}?",
        f"what is {name}",
        f"define {name}",
        f"Please tell me what {name} means.",
        f"Can you explain {name}?",
        f"What is the meaning of {name}?",
        f"And what is {name}?",
        f"What are {many}?" if asks_plural else plain,
    )


def answer_head(entry: Entry) -> str:
    """The answer up to its definition."""
    verb = "stands for" if entry.part == "name" else "means"
    infinitive = " to" if entry.part == "verb" and not entry.gloss.startswith("(") else ""
    return f"The {entry.part} {entry.name} {verb}{infinitive}"


def kind_sentence(entry: Entry) -> str:
    """What the word is a kind of, or nothing."""
    if not entry.kind:
        return ""
    link = {"verb": "a way to", "name": "an instance of"}.get(entry.part, "a kind of")
    return f"It is {link} {entry.kind}."


def synonym_sentence(entry: Entry) -> str:
    """Other spellings of the same meaning, or nothing."""
    return f"Synonyms: {', '.join(entry.synonyms)}." if entry.synonyms else ""


def example_sentence(entry: Entry) -> str:
    """A short use of the word, or nothing."""
    end = "" if entry.example.endswith(("?", "!")) else "."
    return f"Example: {entry.example}{end}" if entry.example else ""


def answer(entry: Entry) -> str:
    """The whole answer as the model should give it."""
    tail = (kind_sentence(entry), synonym_sentence(entry), example_sentence(entry))
    return " ".join([f"{answer_head(entry)} {entry.gloss}.", *filter(None, tail)])
