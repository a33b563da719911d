"""Plain answers to everyday questions, in our own words: what the lexicon expresses at graded levels.

A paragraph is a question on its first line and an answer of three sentences in a neutral voice, without contractions.
`TOPICS` says where each would be asked, in the same order.
"""

ANSWERS = """
Why does my bread not rise?
The starter is probably too young or too cold. Feed it twice a day and keep it near the stove. Bake once it doubles
within six hours.

How do I begin to run?
Alternate one minute of running with two of walking. Go out three times a week and rest in between. Add a minute of
running every week.

I cannot fall asleep at night.
Get up at the same time every day. Put screens away an hour before bed. If it is late and you are awake, read
something dull in low light.

How can I save a little each month?
Move a fixed sum to savings on payday. Write down what you spend for four weeks. Cut the one item that surprises you
most.

Why are the leaves of my fern brown?
The air is too dry for it. Put the pot on a tray of wet pebbles. Do not let the sun reach it at noon.

How should I prepare for a job interview?
Learn what the company makes and for whom. Practise three short stories about your work. Bring one question that shows
you have read about them.

What should I pack first when I move?
Start with the things you have not used this year. Label every box with its room. Keep one bag with what you need on
the first night.

My fingers hurt when I play the guitar.
Sore fingertips are normal in the first weeks. Play ten minutes a day rather than an hour on Sunday. Lighter strings
make it easier as well.

What is a good way to learn Spanish words?
Learn words in short sentences that you would really say. Review them after a day, a week and a month. Speak them
aloud while you cook.

My dog barks when I leave the house.
Leave for very short times and come back calmly. Give it something to chew when you go. Make the absences longer over
two weeks.

How often should I oil my bicycle chain?
Oil it every two weeks and after rain. Wipe the chain with a rag before and after. A chain that squeaks has waited too
long.

How do I answer two hundred emails?
Sort them by sender and archive what is old. Answer everything that takes under two minutes. Set an hour tomorrow for
the three that matter.

What do I need for one night in a tent?
A tent, a warm bag and a mat are the base. Take water, a lamp and a dry layer for the morning. Check the wind before
you choose a place.

My neighbour plays loud music.
Knock in the afternoon and tell them what you hear. Agree on an hour after which it is quiet. Write to the landlord
only if that does not help.

How do I study for an exam in ten days?
Split the material into eight parts and do one a day. Close the book and write down what you recall. Use the last two
days for old papers.

When should I plant tomatoes outside?
Wait until the nights stay above ten degrees. Harden the plants outside for an hour or two each day. Bury the stem up
to the first leaves.

My laptop has become slow.
See which programs start by themselves and stop most of them. Leave a fifth of the disk free. If it is older than six
years, add memory.

I have lost touch with an old friend.
Send a short message about something you both remember. Do not explain the silence at length. Suggest a walk on a
certain day.

I often get a headache at work.
Drink a glass of water every two hours. Raise the screen to the height of your eyes. See a doctor if it is new or
strong.

How can I get better at chess?
Solve ten easy puzzles a day. Look through each lost game for the first mistake. Learn one opening for each colour and
no more.

How do I make better coffee at home?
Grind the beans just before you brew. Use sixty grams for a litre of water. Let the water rest for a moment after it
boils.

Which colour suits a small room?
Light and slightly warm colours make it seem larger. Paint the ceiling a shade lighter than the walls. Try a patch by
the window and look at it in the evening.

Should I take the train or drive?
The train is calmer if you can work on the way. Driving pays off with three people or much luggage. Compare the time
from door to door.

What do I give a colleague who retires?
Collect short notes and photographs from everyone. Add one thing for a hobby they have mentioned. Hand it over in a
small circle.

How do I keep slugs off my lettuce?
Water in the morning so that the ground is dry at night. Lay a board and collect them underneath. Plant lettuce in
raised pots if it is bad.

My photographs are blurred indoors.
There is too little light for the shutter speed. Stand by a window or rest the camera on a table. Raise the
sensitivity one step at a time.

Our weekly meeting takes too long.
Send the points the day before with a time for each. Let people leave when their point is done. Cancel it if there is
nothing to decide.

I am afraid of deep water.
Begin where you can stand and put your face in. Float on your back with somebody next to you. Go one step deeper only
when you are bored.

What can I cook with rice and eggs?
Fry cold rice in a hot pan with a little oil. Push it aside and scramble the eggs. Add soy sauce and whatever greens
there are.

How can I read more books?
Carry a book and read while you wait. Put down what you do not enjoy after fifty pages. Read ten pages before you look
at a screen.

Why did my sweater shrink?
Wool felts when it is warm and rubbed. Wash it cold in a bag without a spin. Dry it flat on a towel.

I had a fight with my sister.
Wait until tomorrow before you write. Say what you are sorry for without a but. Ask how she saw it and listen to the
end.

How do I enjoy a large museum?
Choose two rooms and ignore the rest. Sit in front of one picture for ten minutes. Leave before you are tired.

When do I have to file my taxes?
Look up the date on the letter from last year. Collect receipts in one envelope from January. Ask for more time before
the day and not after.

Our baby wakes up every two hours.
That is common in the first months. Take turns so that each of you gets four hours in a row. Keep the room dark and
say little at night.

The wireless network is weak upstairs.
Move the router to the middle of the house and up high. Choose a channel that the neighbours do not use. Add a second
access point if walls are thick.

Which shoes should I wear for a hike?
Light shoes with a firm sole do for dry paths. Take boots when there are stones or snow. Wear them at home for a week
first.

I must give a speech at a wedding.
Tell one story that shows why they fit. Keep it under four minutes. Learn the first and the last sentence by heart.

Is it worth it to repair an old washing machine?
Repair it if it costs less than half of a new one. Pumps and seals are cheap to replace. It is time for a new one when
the drum is worn.

Where can I help in my town?
Ask the food bank and the library what they lack. Start with two hours a month. Stay with the place where you like the
people.

My cat scratches the sofa.
Put a tall post right next to the sofa. Reward it when it uses the post. Cover the corner with tape for a month.

My slides are too full.
Put one statement on each slide as its title. Move the details to a page that you hand out. Leave out every slide that
you would skip.
"""

TOPICS = """
kitchen fitness health money garden work home leisure study animals travel work outdoors home
study garden computers people health leisure kitchen home travel work garden leisure work fitness
kitchen leisure home people leisure money people computers outdoors people home people animals work
"""
