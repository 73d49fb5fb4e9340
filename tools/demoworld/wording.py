"""How questions are worded: many templates for each, and small variations of all."""

from __future__ import annotations

import random

# {pic} becomes picture, image or photo; {in} an optional "in this picture"; the other slots
# are filled by the caller.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "caption": (
        "What is in this {pic}?", "What is in this {pic}?", "Describe the {pic}.",
        "Describe the {pic}.", "What do you see?", "What is this?", "What do you see{in}?",
        "Describe this {pic}.", "What is in the {pic}?", "What's in this {pic}?",
        "What does this {pic} show?", "What can you see?", "What can you see{in}?",
        "Caption this {pic}.", "Tell me what you see.", "Tell me what is in the {pic}.",
        "What is shown{in}?", "Give a short description of the {pic}.", "Describe what you see.",
        "Can you describe the {pic}?", "Describe this {pic} in one sentence.",
        "Write a caption for this {pic}.", "What is that?", "What's this?", "Describe it.",
        "Please describe this {pic}.", "What objects are in this {pic}?", "Describe",
        "What does the {pic} contain?", "What shapes do you see{in}?", "Describe the {pic} in detail.",
        "What are the objects in the {pic}?", "What is there{in}?",
    ),
    "caption_nth": (
        "What is in the {nth} {pic}?", "What is in the {nth} {pic}?", "Describe the {nth} {pic}.",
        "What do you see in the {nth} {pic}?", "What does the {nth} {pic} show?",
        "What is shown in the {nth} {pic}?", "Tell me what is in the {nth} {pic}.",
        "What can you see in the {nth} {pic}?", "And what is in the {nth} {pic}?",
        "What's in the {nth} {pic}?", "Caption the {nth} {pic}.",
    ),
    "count": (
        "How many {things} are there{in}?", "How many {things} are there?",
        "How many {things} are there{in}?", "How many {things} do you see{in}?",
        "How many {things} can you see{in}?", "Count the {things}{in}.",
        "What is the number of {things}{in}?", "How many {things} are in this {pic}?",
        "How many {things} does this {pic} have?", "Tell me how many {things} there are{in}.",
        "How many {things} are shown{in}?", "how many {things}", "Number of {things}?",
        "Can you count the {things}{in}?", "How many {things} are in the {pic}?",
    ),
    "exists": (
        "Is there {a_thing}{in}?", "Is there {a_thing}?", "Is there {a_thing}{in}?",
        "Do you see {a_thing}{in}?", "Can you see {a_thing}{in}?", "Does this {pic} have {a_thing}?",
        "Does the {pic} show {a_thing}?", "Does the {pic} contain {a_thing}?",
        "Is {a_thing} in this {pic}?", "Is {a_thing} there{in}?", "Are there any {things}{in}?",
        "Is there any {thing}{in}?", "Tell me if there is {a_thing}{in}.",
        "Is there {a_thing} anywhere{in}?", "Have you found {a_thing}{in}?",
    ),
    "anything": (
        "Is there anything {colour}{in}?", "Is there anything {colour}?",
        "Is there something {colour}{in}?", "Do you see anything {colour}{in}?",
        "Can you see something {colour}{in}?", "Is anything {colour}{in}?",
        "Does this {pic} have anything {colour}?", "Is something {colour} there{in}?",
        "Is there any {colour} thing{in}?", "Tell me if anything is {colour}{in}.",
    ),
    "any_text": (
        "Is there any text{in}?", "Is there text{in}?", "Do you see any text{in}?",
        "Is anything written here?", "Is there any writing{in}?", "Does this {pic} have text?",
        "Can you see any text{in}?", "Does the {pic} contain text?", "Is something written{in}?",
        "Are there any letters or digits{in}?",
    ),
    "colour": (
        "What colour is the {thing}{in}?", "What colour is the {thing}?",
        "What colour is the {thing}?", "What colour is the {thing}{in}?",
        "Which colour is the {thing}{in}?", "What is the colour of the {thing}{in}?",
        "Tell me the colour of the {thing}{in}.", "Which colour does the {thing} have{in}?",
        "What colour does the {thing} have{in}?", "What's the colour of the {thing}{in}?",
        "Name the colour of the {thing}{in}.", "The {thing} is what colour?",
        "Can you tell me what colour the {thing} is{in}?", "what colour has the {thing}{in}",
    ),
    "shape": (
        "Which shape is {colour}{in}?", "Which shape is {colour}?", "Which shape is {colour}?",
        "What shape is {colour}{in}?", "Which object is {colour}{in}?", "What is {colour}{in}?",
        "What shape is the {colour} object{in}?", "What shape is the {colour} one{in}?",
        "Which shape is the {colour} one{in}?", "What is the shape of the {colour} object{in}?",
        "Name the {colour} shape{in}.", "What shape does the {colour} object have{in}?",
        "Tell me which shape is {colour}{in}.", "What is the {colour} shape{in}?",
        "Which one is {colour}{in}?", "Which of the shapes is {colour}{in}?",
    ),
    "at": (
        "Which shape is {place}{in}?", "Which shape is {place}?", "What shape is {place}{in}?",
        "What is {place}{in}?", "Which object is {place}{in}?", "What do you see {place}{in}?",
        "What can you see {place}{in}?", "Name the shape {place}{in}.",
        "Tell me what is {place}{in}.", "What object is {place}{in}?", "What's {place}{in}?",
        "Describe the shape {place}{in}.",
    ),
    "where": (
        "Where is the {thing}{in}?", "Where is the {thing}?", "Where is the {thing}?",
        "Where in the {pic} is the {thing}?", "Where do you see the {thing}{in}?",
        "Where can you see the {thing}?", "In which part of the {pic} is the {thing}?",
        "Where can I find the {thing}{in}?", "Tell me where the {thing} is{in}.",
        "What is the position of the {thing}{in}?", "What place is the {thing} in?",
        "Where's the {thing}{in}?", "Locate the {thing}{in}.", "Find the {thing}{in}.",
    ),
    "size": (
        "How big is the {thing}{in}?", "How big is the {thing}?", "How large is the {thing}{in}?",
        "What size is the {thing}{in}?", "What is the size of the {thing}{in}?",
        "Is the {thing} large or small?", "Is the {thing} small or large{in}?",
        "Is the {thing} big or small{in}?", "Which size is the {thing}{in}?",
        "Tell me the size of the {thing}{in}.", "Which size does the {thing} have{in}?",
    ),
    "read": (
        "What does it say?", "What does it say?", "Read the text.", "Read the text.",
        "What is written here?", "What is written here?", "What does it say{in}?",
        "What does the {pic} say?", "What does the text say{in}?", "What is the text{in}?",
        "What text is in this {pic}?", "Read the text{in}.", "What is written{in}?",
        "Can you read this?", "Read this.", "Can you read the text{in}?", "What does this say?",
        "Which text do you see{in}?", "Transcribe the text{in}.", "What letters do you see{in}?",
        "What is written in the {pic}?", "OCR", "Read it.", "Read the letters{in}.",
        "What number or word is this?", "Extract the text{in}.", "What does the sign say?",
    ),
    "which_picture": (
        "Which {pic} has {the_thing}?", "Which {pic} has {the_thing}?",
        "Which {pic} shows {the_thing}?", "In which {pic} is {the_thing}?",
        "Which {pic} contains {the_thing}?", "In which {pic} do you see {the_thing}?",
        "Which of the {pic}s has {the_thing}?", "Which of the two {pic}s shows {the_thing}?",
        "Which one has {the_thing}?", "Tell me which {pic} has {the_thing}.",
        "Where is {the_thing}, in the first or the second {pic}?",
    ),
    "different": (
        "What is different?", "What is different?", "What is different?", "What's different?",
        "What is the difference?", "What is the difference between the {pic}s?",
        "What is different between the {pic}s?", "How are the {pic}s different?",
        "How do the {pic}s differ?", "What has changed?", "Find the difference.",
        "Compare the {pic}s.", "What differs between the two {pic}s?", "Spot the difference.",
        "What is the difference between these two {pic}s?", "Compare these two {pic}s.",
    ),
    "same": (
        "Are the {pic}s the same?", "Are the two {pic}s the same?", "Are these {pic}s the same?",
        "Are the {pic}s identical?", "Are these two {pic}s identical?",
        "Do the {pic}s show the same?", "Do both {pic}s show the same thing?",
        "Is there a difference?", "Are the {pic}s different?", "Are they the same?",
    ),
    "both": (
        "What is in these {pic}s?", "What is in the {pic}s?", "Describe the {pic}s.",
        "Describe both {pic}s.", "What do you see in the {pic}s?", "Describe these {pic}s.",
        "What is in the two {pic}s?", "Describe the two {pic}s.", "What do the {pic}s show?",
        "What can you see in these {pic}s?",
    ),
    "it_colour": (
        "And what colour is it?", "And what colour is it?", "What colour is it?",
        "Which colour is it?", "What is its colour?", "And which colour?", "And its colour?",
        "What colour does it have?", "And what is the colour?", "Tell me its colour.",
        "And the colour?", "What colour?",
    ),
    "it_where": (
        "Where is it?", "Where is it?", "And where is it?", "Where in the {pic} is it?",
        "And where?", "What is its position?", "Where can I find it?", "Tell me where it is.",
        "Where do you see it?", "And where is it in the {pic}?", "Where?",
    ),
    "it_size": (
        "How big is it?", "How big is it?", "And how big is it?", "What size is it?",
        "How large is it?", "Is it large or small?", "Is it small or large?",
        "And what size is it?", "What is its size?", "Is it big or small?", "And the size?",
    ),
    "it_shape": (
        "And what shape is it?", "And what shape is it?", "What shape is it?",
        "Which shape is it?", "What is its shape?", "What shape does it have?",
        "And which shape is it?", "And the shape?", "What is it?", "And its shape?",
    ),
    "others": (
        "Are there any others?", "Are there any others?", "Any others?", "Are there others?",
        "Are there any other shapes?", "Is there anything else?", "Do you see any others?",
        "And are there any others?", "Are there more shapes?", "What about other shapes?",
    ),
    "hello": (
        "Hi", "Hello", "Hi!", "Hello!", "Hey", "Good morning", "Hello there", "How are you?",
        "Who are you?", "What can you do?", "Help", "Thanks", "Can you help me?", "Test", "ok",
        "Tell me a joke.", "What is your name?", "Hello, how are you?", "Tell me a story.",
    ),
}
SYSTEMS = (
    "You are a helpful assistant.", "You are a helpful assistant.", "Answer briefly.",
    "Answer briefly.", "You are a helpful vision assistant.", "Be concise.",
    "You are a helpful AI assistant.", "Answer in one sentence.", "You describe pictures.",
    "You are an assistant that looks at pictures.", "Answer the question about the image.",
    "Be brief and precise.", "You are a camera assistant.", "Keep your answers short.",
)
TAILS = (
    " Answer in one sentence.", " Answer briefly.", " Please answer.", " Be brief.",
    " Answer with a short sentence.", " Keep it short.", " Thanks.", " Look carefully.",
)
INS = ("in this {pic}", "in the {pic}", "in this {pic}", "in the {pic}", "here")
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "star": "stars",
           "cross": "crosses", "shape": "shapes"}


def plural(noun: str) -> str:
    """The plural of a noun of this world."""
    return PLURALS.get(noun, noun + "s")


def article(phrase: str) -> str:
    """The phrase with "a" or "an"."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def word(rng: random.Random, key: str, inside: str = "", plain: bool = False, **slots: str) -> str:
    """A question of the kind ``key``.

    ``inside`` forces the words for {in} (such as "in the second picture"); ``plain`` leaves
    out the variations that do not belong to the template.
    """
    text = rng.choice(TEMPLATES[key])
    if "{in}" in text:
        words = inside or (rng.choice(INS) if rng.random() < 0.3 else "")
        text = text.replace("{in}", " " + words if words else "")
    pic = rng.choices(("picture", "image", "photo"), (0.5, 0.35, 0.15))[0]
    text = text.replace("{pic}", pic)
    for name, value in slots.items():
        text = text.replace("{" + name + "}", value)
    if rng.random() < 0.45:
        text = text.replace("colour", "color")
    if rng.random() < 0.45:
        text = text.replace("grey", "gray")
    if plain:
        return text
    kind = rng.random()
    if kind < 0.05:
        text = "Please " + text[0].lower() + text[1:] if text[-1] == "." else text
    elif kind < 0.1:
        text = text[:-1] + ", please" + text[-1] if text[-1] in "?." else text
    elif kind < 0.16:
        text = text.rstrip("?.")
    elif kind < 0.26:
        text = text[0].lower() + text[1:]
        if rng.random() < 0.4:
            text = text.rstrip("?.")
    elif kind < 0.29 and key not in ("hello", "read"):
        text = text.upper() if rng.random() < 0.15 else text.lower()
    elif kind < 0.36 and key != "hello":
        text += rng.choice(TAILS)
    return text


def asked_inside(rng: random.Random, nth: str) -> str:
    """Words such as "in the second picture"."""
    return f"in the {nth} {rng.choice(('picture', 'picture', 'image', 'photo'))}"
