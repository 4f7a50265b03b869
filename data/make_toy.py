#!/usr/bin/env python3
"""Writes toy.txt, the built-in toy corpus: tiny stories from a small grammar, the same text on every run.

    python3 make_toy.py > toy.txt

Written for this project; neither the sentences nor the word lists are taken from another text. The words are few and the
sentences short, so that a model of a million parameters learns to spell within a few hundred steps; their combinations are
many, so that it cannot learn the stories by heart.
"""

import random

STORIES = 900
SEPARATOR = "<|endoftext|>"

CHILDREN = [("Anna", "she", "her"), ("Ben", "he", "his"), ("Clara", "she", "her"), ("David", "he", "his"),
            ("Emma", "she", "her"), ("Felix", "he", "his"), ("Greta", "she", "her"), ("Hugo", "he", "his"),
            ("Ida", "she", "her"), ("Jonas", "he", "his"), ("Kira", "she", "her"), ("Leo", "he", "his"),
            ("Mia", "she", "her"), ("Nils", "he", "his"), ("Olga", "she", "her"), ("Paul", "he", "his"),
            ("Rosa", "she", "her"), ("Sam", "he", "his"), ("Tilda", "she", "her"), ("Victor", "he", "his")]
ANIMALS = ["cat", "dog", "rabbit", "duck", "goat", "horse", "mouse", "fox", "owl", "frog", "bear", "hen", "turtle", "pony",
           "sheep", "hedgehog", "robin", "squirrel"]
ADJECTIVES = ["small", "brown", "grey", "young", "old", "funny", "shy", "brave", "sleepy", "hungry", "clever", "quiet",
              "white", "round", "friendly"]
PLACES = [("in the garden", "the garden"), ("by the river", "the river"), ("in the forest", "the forest"),
          ("on the hill", "the hill"), ("at the farm", "the farm"), ("near the lake", "the lake"),
          ("in the park", "the park"), ("behind the house", "the yard"), ("on the beach", "the beach"),
          ("by the old mill", "the old mill"), ("in the village", "the village"), ("under the bridge", "the bridge")]
WEATHER = ["The sun was warm and bright.", "It was raining a little.", "A cold wind was blowing.", "Snow lay on the ground.",
           "The sky was blue and clear.", "There were big grey clouds.", "The morning was foggy and still.",
           "The air smelled of flowers.", "Yellow leaves fell from the trees.", "It was the hottest day of summer."]
OBJECTS = ["ball", "kite", "hat", "key", "bell", "basket", "book", "boat", "lamp", "stone", "blanket", "drum", "shell",
           "button", "spoon", "flute", "ribbon", "feather", "cup", "map"]
COLOURS = ["red", "blue", "green", "yellow", "golden", "silver", "orange", "purple", "black", "pink"]
FOODS = ["bread", "soup", "apples", "cake", "berries", "cheese", "pears", "nuts", "honey", "warm milk", "carrots", "plums"]
HIDING = ["under a bush", "in the tall grass", "behind a big tree", "beside a rock", "in a hole in the ground",
          "on top of a wall", "between two logs", "next to the gate", "below the stairs", "inside an empty box"]
GLAD = ["happy", "glad", "proud", "cheerful", "excited", "thankful"]
SORRY = ["sad", "afraid", "worried", "lonely", "tired", "lost"]
FAMILY = ["mother", "father", "grandmother", "grandfather", "sister", "brother", "aunt", "uncle"]
MOVES = ["walked", "ran", "hurried", "went", "skipped", "wandered"]
GAMES = ["played hide and seek", "built a tower of stones", "sang a song", "danced in a circle", "told each other stories",
         "looked for frogs", "climbed a tree", "counted the birds", "jumped over puddles", "drew pictures in the sand",
         "made a boat of paper", "rolled down the slope"]
SOUNDS = ["a soft noise", "a loud splash", "a tiny voice", "somebody crying", "a strange whistle", "the ringing of a bell"]
TIMES = ["One day", "One morning", "On Monday", "On a Sunday", "Early in the spring", "Last winter", "After breakfast",
         "Before school", "One evening", "Late in the summer"]
LESSONS = ["It is good to share.", "A friend is better than gold.", "Small hands can do big things.",
           "It is all right to ask for help.", "Patience makes hard things easy.", "Kind words cost nothing.",
           "Even the smallest can be brave.", "Every day brings something new."]


def article(noun_phrase):
    return ("an " if noun_phrase[0] in "aeiou" else "a ") + noun_phrase


class Story:
    """One story: a child, an animal, a thing, a place, and what happens among them."""

    def __init__(self, rng):
        self.pick = rng.choice
        self.chance = lambda p: rng.random() < p
        self.name, self.they, self.their = self.pick(CHILDREN)
        self.friend = self.pick([child for child in CHILDREN if child[0] != self.name])[0]
        self.animal = self.pick(ANIMALS)
        self.kind = self.pick(ADJECTIVES)
        self.thing = self.pick(OBJECTS)
        self.colour = self.pick(COLOURS)
        self.where, self.place = self.pick(PLACES)
        self.family = self.pick(FAMILY)
        self.food = self.pick(FOODS)

    @property
    def they_cap(self):
        return self.they.capitalize()

    def opening(self):
        first = self.pick([
            f"{self.pick(TIMES)}, {self.name} {self.pick(MOVES)} to {self.place}.",
            f"{self.pick(TIMES)}, {self.name} was playing {self.where}.",
            f"{self.name} lived {self.where} with {self.their} {self.family}.",
            f"Once there was a child called {self.name} who loved {self.place}.",
            f"{self.name} and {self.their} {self.family} had a little house {self.where}.",
            f"{self.pick(TIMES)}, {self.name} wanted to see what was {self.where}.",
        ])
        return [first] + ([self.pick(WEATHER)] if self.chance(0.7) else [])

    def find_thing(self):
        where = self.pick(HIDING)
        lines = [self.pick([
            f"{self.they_cap} found {article(self.colour + ' ' + self.thing)} {where}.",
            f"There was {article(self.colour + ' ' + self.thing)} {where}.",
            f"{self.they_cap} saw something {self.colour} {where}. It was {article(self.thing)}!",
            f"Something was shining {where}. It was {article(self.colour + ' ' + self.thing)}.",
        ])]
        lines.append(self.pick([
            f'"Whose {self.thing} is this?" asked {self.name}.',
            f'"What a nice {self.thing}!" said {self.name}.',
            f"{self.name} picked up the {self.thing} and put it in {self.their} bag.",
            f"The {self.thing} was very {self.pick(['old', 'light', 'heavy', 'clean', 'dusty', 'pretty'])}.",
            f"{self.name} had never seen such {article(self.thing)}.",
        ]))
        return lines

    def meet_animal(self):
        lines = [self.pick([
            f"Then {article(self.kind + ' ' + self.animal)} came along.",
            f"{self.they_cap} met {article(self.kind + ' ' + self.animal)} {self.pick(HIDING)}.",
            f"{self.name} heard {self.pick(SOUNDS)}. It was {article(self.kind + ' ' + self.animal)}.",
            f"{article(self.kind + ' ' + self.animal).capitalize()} was sitting {self.pick(HIDING)}.",
        ])]
        lines.append(self.pick([
            f'"Hello," said the {self.animal}. "Do you want to play with me?"',
            f'"Good morning, little {self.animal}," said {self.name}.',
            f'"Why are you so {self.pick(SORRY)}?" {self.name} asked the {self.animal}.',
            f"The {self.animal} looked at {self.name} and did not run away.",
            f"The {self.animal} was {self.pick(SORRY)}, because it had no friends.",
            f'"Can you help me?" asked the {self.animal}. "I am {self.pick(SORRY)}."',
        ]))
        return lines

    def give_food(self):
        return [
            self.pick([
                f"{self.name} had some {self.food} in {self.their} basket.",
                f"{self.their.capitalize()} {self.family} had given {self.name} some {self.food}.",
                f"The {self.animal} liked {self.food} more than anything.",
            ]),
            self.pick([
                f"{self.they_cap} gave the {self.animal} some of it, and the {self.animal} ate it all.",
                f'"Here, this is for you," {self.they} said.',
                f"They sat down together and ate until nothing was left.",
                f'"Thank you," said the {self.animal}. "I like {self.food}."',
            ]),
        ]

    def lose_thing(self):
        return [
            self.pick([
                f"But the {self.thing} fell into the water.",
                f"Suddenly the wind took the {self.thing} away.",
                f"Then {self.name} could not find the {self.colour} {self.thing} any more.",
                f"The {self.thing} broke, and {self.name} was {self.pick(SORRY)}.",
            ]),
            self.pick([
                f'"Oh no!" cried {self.name}. "My {self.thing}!"',
                f'"Do not worry," said the {self.animal}. "I will get it back."',
                f"{self.name} and the {self.animal} looked for it everywhere.",
                f"The {self.animal} had an idea and {self.pick(MOVES)} away.",
            ]),
            self.pick([
                f"After a while they found it {self.pick(HIDING)}.",
                f"The {self.animal} brought it back, and {self.name} laughed.",
                f"{self.their.capitalize()} {self.family} helped to mend it.",
                f"In the end {self.friend} found it {self.pick(HIDING)}.",
            ]),
        ]

    def friend_comes(self):
        return [
            self.pick([
                f"{self.friend} was there too.",
                f"Soon {self.friend} came to {self.place}.",
                f"{self.name} called {self.their} friend {self.friend}.",
                f'"Look what I have," {self.name} said to {self.friend}.',
            ]),
            self.pick([
                f"They {self.pick(GAMES)} and {self.pick(GAMES)}.",
                f"All afternoon they {self.pick(GAMES)}.",
                f'"Let us be friends," said {self.friend}, and they {self.pick(GAMES)}.',
                f"{self.friend} wanted the {self.thing} too, so they took turns.",
            ]),
        ]

    def ending(self):
        lines = [self.pick([
            f"When it got dark, {self.name} {self.pick(MOVES)} home.",
            f"{self.name} gave the {self.thing} to the {self.animal}.",
            f"In the evening {self.name} told {self.their} {self.family} about the {self.animal}.",
            f'"It is late," said {self.their} {self.family}. "Come home now."',
            f"From that day on, {self.name} and the {self.animal} were friends.",
        ])]
        lines.append(self.pick([
            f"{self.they_cap} was very {self.pick(GLAD)}.",
            f"Everyone was {self.pick(GLAD)} and {self.pick(GLAD)}.",
            f"That night {self.name} slept well and dreamed of the {self.colour} {self.thing}.",
            f"They ate {self.pick(FOODS)} and went to bed.",
            f"{self.pick(LESSONS)}",
            f'"That was a good day," said {self.name}.',
        ]))
        return lines

    def text(self):
        scenes = [self.find_thing, self.meet_animal]
        scenes += [scene for scene in (self.give_food, self.lose_thing, self.friend_comes) if self.chance(0.6)]
        paragraphs = [self.opening()] + [scene() for scene in scenes] + [self.ending()]
        lines = []
        for paragraph in paragraphs:
            if lines and self.chance(0.6):
                lines[-1] += " " + " ".join(paragraph)
            else:
                lines.append(" ".join(paragraph))
        return "\n".join(lines)


def main():
    rng = random.Random(1)
    print(f"\n{SEPARATOR}\n".join(Story(rng).text() for _ in range(STORIES)))


if __name__ == "__main__":
    main()
