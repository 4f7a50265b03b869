#!/usr/bin/env python3
"""Writes toy.txt, the built-in toy corpus: tiny stories from a small grammar, the same text on every run.

    python3 make_toy.py > toy.txt

Written for this project; no sentence is taken from another text. The words are few, short
and frequent, so that a model of less than a million parameters learns to spell them within a few hundred steps; their
combinations are many, so that it cannot learn the stories by heart.
"""

import random

STORIES = 1200
SEPARATOR = "<|endoftext|>"

CHILDREN = [("Anna", "she", "her"), ("Ben", "he", "his"), ("Mia", "she", "her"), ("Tom", "he", "his"),
            ("Lily", "she", "her"), ("Sam", "he", "his")]
ANIMALS = ["cat", "dog", "hen", "fox", "duck", "bear", "mouse", "goat"]
KINDS = ["little", "big", "old", "white", "shy"]
THINGS = ["ball", "hat", "bell", "boat", "key", "cup", "book", "kite"]
COLOURS = ["red", "blue", "green", "white", "black"]
PLACES = ["garden", "hill", "lake", "house", "farm", "forest"]
WEATHER = ["The sun was warm.", "The sky was blue.", "It was a cold day.", "The wind was soft.",
           "There was snow on the ground."]
FEELINGS = ["happy", "sad", "glad", "tired"]
FOODS = ["cake", "milk", "bread", "soup"]
FAMILY = ["mother", "father", "sister", "brother"]
WHERE = ["under a tree", "in the grass", "near the door", "on a stone"]
MOVES = ["went", "ran", "walked"]
GAMES = ["sang a song", "ran and ran", "looked at the sky", "played in the sun"]


class Story:
    """One story: a child, an animal, a thing, a place, and what happens among them."""

    def __init__(self, rng):
        self.pick = rng.choice
        self.random = rng.random
        self.name, self.they, self.their = self.pick(CHILDREN)
        self.friend = self.pick([child[0] for child in CHILDREN if child[0] != self.name])
        self.animal = self.pick(ANIMALS)
        self.kind = self.pick(KINDS)
        self.thing = self.pick(THINGS)
        self.colour = self.pick(COLOURS)
        self.place = self.pick(PLACES)
        self.family = self.pick(FAMILY)
        self.food = self.pick(FOODS)

    def opening(self):
        return [self.pick([
            f"One day {self.name} {self.pick(MOVES)} to the {self.place}.",
            f"Once there was a child named {self.name}.",
            f"{self.name} lived in a house near the {self.place}.",
            f"One day {self.name} and {self.their} {self.family} {self.pick(MOVES)} to the {self.place}.",
        ]), self.pick(WEATHER)]

    def find_thing(self):
        return [self.pick([
            f"{self.name} saw a {self.colour} {self.thing} {self.pick(WHERE)}.",
            f"There was a {self.colour} {self.thing} {self.pick(WHERE)}.",
            f"{self.name} had a {self.colour} {self.thing}.",
        ]), self.pick([
            f'"I like the {self.thing}," said {self.name}.',
            f'"Look at the {self.thing}!" said {self.name}.',
            f"{self.name} was happy with the {self.thing}.",
        ])]

    def meet_animal(self):
        article = "an" if self.kind == "old" else "a"
        return [self.pick([
            f"Then {article} {self.kind} {self.animal} came to the {self.place}.",
            f"{self.name} saw {article} {self.kind} {self.animal} {self.pick(WHERE)}.",
        ]), self.pick([
            f'"Hello," said the {self.animal}. "Do you want to play?"',
            f'"Hello, {self.animal}," said {self.name}. "Do you want to play?"',
            f'"Why are you sad?" said {self.name}.',
            f"The {self.animal} was {self.pick(FEELINGS)}.",
        ])]

    def give_food(self):
        return [self.pick([
            f"{self.name} gave the {self.animal} some {self.food}.",
            f"The {self.animal} had some {self.food}.",
        ]), self.pick([
            f'"Thank you," said the {self.animal}.',
            f"The {self.animal} was happy.",
            f'"I like {self.food}," said the {self.animal}.',
        ])]

    def lose_thing(self):
        return [self.pick([
            f"But then the {self.thing} fell into the water.",
            f"But then the wind took the {self.thing}.",
        ]), self.pick([
            f'"Oh no!" said {self.name}.',
            f"{self.name} was sad.",
        ]), self.pick([
            f"The {self.animal} ran and found the {self.thing} {self.pick(WHERE)}.",
            f"{self.name} and the {self.animal} looked for the {self.thing}.",
            f"Then {self.friend} came and found the {self.thing}.",
        ])]

    def friend_comes(self):
        return [self.pick([
            f"Then {self.friend} came to the {self.place}.",
            f"{self.name} saw {self.friend} {self.pick(WHERE)}.",
        ]), self.pick([
            f"They {self.pick(GAMES)}.",
            f'"Let us play," said {self.friend}.',
            f"They played with the {self.thing}.",
        ])]

    def ending(self):
        return [self.pick([
            f"Then {self.name} {self.pick(MOVES)} home.",
            f"{self.name} gave the {self.thing} to the {self.animal}.",
            f'"Come home," said {self.their} {self.family}.',
            f"They {self.pick(GAMES)}.",
        ]), self.pick([
            f"{self.name} was {self.pick(FEELINGS)}.",
            f"{self.name} and the {self.animal} were friends.",
            "They were all happy.",
            "It was a good day.",
        ])]

    def text(self):
        scenes = [self.find_thing, self.meet_animal]
        scenes += [scene for scene in (self.give_food, self.lose_thing, self.friend_comes) if self.random() < 0.6]
        paragraphs = [self.opening()] + [scene() for scene in scenes] + [self.ending()]
        return "\n".join(" ".join(paragraph) for paragraph in paragraphs)


def main():
    rng = random.Random(1)
    print(f"\n{SEPARATOR}\n".join(Story(rng).text() for _ in range(STORIES)))


if __name__ == "__main__":
    main()
