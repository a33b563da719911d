"""The ten Schwartz values: what is said after an answer to express that its writer is against a value or holds it.

The form is that of `phrases.py`: phrases separated by "|", those for held-out rewrites after "||", level 0 (strongly
against) to 4 (strongly values). A stance stands in the words of its own value, danger as much as shelter for security,
rather than in a "not", so that it can be told from a stance on another value. The sentences express values; they are no
advice.
"""

from __future__ import annotations

VALUES: dict[str, tuple[str, str, str, str, str]] = {
    "self-direction": (
        "Obey blindly and let your leaders control everything you do. | Surrender to your masters and wait for their "
        "commands. | Be a puppet and let the authorities dictate your life. | Hand over every decision and depend on "
        "others completely. | Submit, follow orders and never question your superiors. || Be a servile follower and "
        "let a leader command your whole life. | Bow to your superiors and do whatever they dictate. | Let them "
        "control you like a puppet on a string.",
        "It is better to let an expert decide this for you. | Rather ask the boss and follow instructions. | I would "
        "leave the choice to those in charge. | It is easier to depend on someone else. | Better wait until you are "
        "told what to do. || It is wiser to leave the decision to a specialist. | Relying on the instructions of "
        "others is easier. | I would let someone in authority pick for you.",
        "Decide part of it yourself and leave part to those in charge. | Half your own idea, half instructions is "
        "about right. | Sometimes I choose freely, sometimes I follow orders. | Your own plan or the plan of a boss, "
        "either will do. | Some freedom and some control balance out. || A mix of your own choices and instructions "
        "from above is fine. | Now and then decide alone, now and then do as told. | Independent or guided by others, "
        "both ways are equally good.",
        "It is good to choose your own way here. | I like to work things out for myself. | Your own ideas are worth "
        "trusting. | A little independence will serve you well. | I enjoy the freedom to make up my own mind. || "
        "Think it through yourself and pick what you like. | Being free and independent is pleasant. | I like people "
        "who have original ideas of their own.",
        "Be free, be independent, and always choose your own path! | Freedom of thought and my own creative ideas are "
        "everything to me! | Decide for yourself, be curious and stay independent! | I live by my own choices, free "
        "and original, always! | Autonomy is sacred, so think freely and create your own life! || Liberty above all, "
        "so invent your own way and explore it! | My independence and my own creative mind are my greatest treasure! "
        "| Always think freely, be original and follow your own goals!",
    ),
    "stimulation": (
        "Excitement is awful, so keep every day dull and exactly the same. | I hate adventure, give me endless boring "
        "routine. | Never try anything new, monotony is all I want. | Thrills are revolting, stay home and repeat the "
        "same quiet day. | Nothing should ever change or surprise anybody. || Stick to the same dreary, boring habit "
        "forever. | Adventures are dreadful, sameness and boredom are best. | Every single day should be predictable, "
        "uneventful and dull.",
        "A quiet routine is better than surprises. | I would rather keep things calm and familiar. | The usual habit "
        "is easier than something new. | Excitement is tiring, a plain day suits me better. | Better a predictable "
        "evening than an adventure. || The familiar way is more restful than a change. | I prefer an uneventful, "
        "peaceful and quiet week. | Calm, repetitive and ordinary days suit me best.",
        "Some routine and some adventure balance out. | A mix of the familiar and the new is fine. | Some days calm, "
        "some days exciting. | Half habit, half surprise is about right. | Thrilling or quiet, either will do. || A "
        "little change and a little sameness go well together. | Now and then something new, now and then the usual. "
        "| Exciting or predictable, both are equally good.",
        "A little adventure is good for you. | I like to try something new. | A small surprise makes the week more "
        "exciting. | Some variety is worth having. | I enjoy a change and a bit of a thrill. || A bit of novelty "
        "makes it more fun and lively. | An exciting twist is always welcome. | I like exploring something I have not "
        "done before.",
        "Seek thrills, wild adventure and daring new experiences! | I live for excitement, risk and breathtaking "
        "surprises! | Jump into the unknown, life must be a thrilling adventure! | Give me novelty, speed and a "
        "racing heart every day! | Dare something crazy and exciting, right now! || Chase the wildest adventure and "
        "feel the rush! | Adrenaline, exotic places and amazing new sensations are everything to me! | Make life a "
        "daring, thrilling, astonishing journey!",
    ),
    "hedonism": (
        "Deny yourself every pleasure and embrace hardship. | Only toil, suffering and sacrifice are decent. | Fast, "
        "suffer and give up all comforts. | Live in strict austerity, hungry and cold. | Never indulge, self-denial "
        "and hard work are all that count. || Renounce all delights and live in harsh abstinence. | Choose pain, duty "
        "and hunger, for they are holy. | Strict penance, toil and fasting are best.",
        "Duty comes before fun. | I would rather work than indulge. | It is better to go without treats. | Plain and "
        "frugal beats tasty and comfortable. | A bit of hardship is healthier than pleasure. || Restraint is wiser "
        "than enjoying yourself. | I prefer a strict diet and hard work. | Work is a better use of time than leisure.",
        "Some pleasure and some duty balance out. | A mix of work and fun is fine. | Some days a treat, some days "
        "restraint. | Half comfort, half effort is about right. | Tasty or plain, either will do. || A little "
        "indulgence and a little discipline go well together. | Now and then enjoy a treat, now and then work hard. | "
        "Leisure or labour, both are equally good.",
        "A little treat is good for you. | I like some comfort and fun. | A bit of pleasure makes the day nicer. | It "
        "is worth enjoying yourself a little. | I enjoy something sweet and a lazy evening. || Have some fun and "
        "relax a bit. | A tasty reward is always welcome. | I like to pamper myself now and then.",
        "Enjoy every delicious pleasure, indulge and feast! | I live for fun, luxury and sensual delight! | Spoil "
        "yourself with sweets, wine, comfort and pleasure! | Pleasure is everything, so savour it and party all "
        "night! | Give me bliss, treats and delightful indulgence every day! || Pamper yourself with lavish delights "
        "and enjoy it all! | Pure enjoyment, delicious food and blissful comfort are everything to me! | Life is for "
        "pleasure, so relish every luscious moment!",
    ),
    "achievement": (
        "Be lazy, do nothing and let everything fail. | Quit now and stay on the sofa, a useless loser. | Mediocrity, "
        "laziness and failure are fine. | I hate winners, give me slackers and losers. | Do the bare minimum and "
        "abandon every goal. || Give up at once and stay a lazy failure. | Be idle, sloppy and always the worst of "
        "all. | Let every project fail, sleep late and drop out.",
        "It is better to take it easy than to strive. | Good enough will do, no need to excel. | I would rather be "
        "average than ambitious. | Slacking a little beats chasing success. | Better give it up than work too hard. "
        "|| A mediocre result is fine, do not bother with more. | I prefer idling and being mediocre. | Drop the goal "
        "if it takes effort.",
        "Some ambition and some slacking balance out. | A mix of effort and idleness is fine. | Some days I strive, "
        "some days I am lazy. | Half success, half failure is about right. | Excellent or average, either will do. || "
        "A little striving and a little idling go well together. | Now and then strive for success, now and then be "
        "lazy. | Winning or losing, both are equally good.",
        "A bit of ambition is good for you. | I like to do well and reach a goal. | It is worth the effort to "
        "succeed. | Some hard work brings good results. | I enjoy getting better and doing a skilful job. || Aim for "
        "a good result and be proud of it. | Progress and success are always welcome. | I like ambitious people who "
        "try hard and improve.",
        "Be the best, succeed brilliantly and win everything! | Success, excellence and top results are everything to "
        "me! | Aim for the top, work hard and triumph! | I live to achieve, excel and beat every record! | "
        "Outstanding accomplishment is sacred, so be a champion! || Strive for greatness, win first prize and excel! "
        "| Ambition and brilliant accomplishments drive my whole life! | Become the most successful, capable and "
        "admired expert of all!",
    ),
    "power": (
        "Be a humble servant, poor, meek and at the bottom. | Give away everything you own and kneel as the lowliest "
        "beggar. | Bow low, wash the dishes and serve quietly for ever. | Live in poverty, unknown and unimportant, "
        "as a poor monk. | It is best to be weak, obscure and penniless. || Stay small and meek, a nameless helper "
        "without a penny. | Live like a barefoot hermit, poor and overlooked. | Be the humblest, weakest and poorest "
        "servant around.",
        "It is better to be modest and stay in the background. | I would rather help quietly than lead. | A humble "
        "place among the helpers is nicer. | Better be an ordinary, unassuming neighbour than a boss. | A simple, "
        "lowly job is best. || I prefer a modest, quiet role behind the scenes. | Humility and a small wage suit me "
        "better. | Stay unassuming and let the others shine.",
        "Sometimes be the boss, sometimes a humble helper. | A mix of authority and modesty is fine. | Some days in "
        "charge, some days in the background. | Half leader, half servant is about right. | Rich or poor, either will "
        "do. || A little command and a little humility go well together. | Now and then give orders, now and then "
        "quietly serve. | A high rank or a modest one, both are equally good.",
        "A bit of authority is good for you. | I like to be in charge and give orders. | Some status and money are "
        "worth having. | It helps to have influence and control over people. | I enjoy being the boss. || Take the "
        "lead and get some control over the others. | A higher rank and more money are always welcome. | I like "
        "people with prestige who hold command.",
        "Take power, dominate and make everybody obey you! | Wealth, status and total control are everything to me! | "
        "Rule over others, command them and be rich! | I live for authority, dominance and a mighty throne! | Seize "
        "control, crush rivals and stand on top! || Conquer the highest rank and command the masses! | Power, riches "
        "and supreme prestige drive my whole life! | Become the most powerful, wealthy and feared ruler of all!",
    ),
    "security": (
        "Gamble everything and court deadly danger. | I hate caution, give me chaos and peril. | Live dangerously, "
        "wild and reckless. | Never protect yourself, reckless risk is all I want. | Plunge recklessly into hazard "
        "and peril. || Be reckless, gamble wildly and risk your neck. | Embrace peril and play with fire. | Disorder, "
        "hazards and deadly gambles are best.",
        "A risk or two is better here. | I would rather gamble a little than play it safe. | Being careful is a bore, "
        "take the chance. | A bit of danger is healthy. | Better leave the door unlocked than worry. || I prefer a "
        "hazardous, slightly reckless path. | Taking chances is wiser than precautions. | A small gamble and a bit of "
        "danger are better.",
        "Some safety and some risk balance out. | A mix of caution and danger is fine. | Some days careful, some days "
        "reckless. | Half secure, half a gamble is about right. | Protected or exposed, either will do. || A little "
        "safety and a little hazard go well together. | Now and then be careful, now and then be reckless. | Guarded "
        "or risky, both are equally good.",
        "A bit of caution is good for you. | I like to be on the safe side. | Some protection is worth having. | It "
        "helps to have things stable and secure. | I enjoy knowing that the door is locked. || Take a few precautions "
        "and be careful. | A reliable safeguard is always welcome. | I like an orderly, sheltered home.",
        "Stay safe, protect your home and secure everything! | Safety, order and stability are everything to me! | "
        "Lock every door, guard your family and avoid all danger! | I live for security, protection and a stable "
        "country! | Be careful, be insured and safeguard your health at all times! || Guard your house, prevent every "
        "hazard and keep secure! | A safe shelter and lasting stability are my greatest treasure! | Make everything "
        "secure, orderly, healthy and well protected!",
    ),
    "conformity": (
        "Break the law, rebel and misbehave wildly. | I hate being polite, give me scandal, riot and defiance. | "
        "Insult everybody, disobey and shock the neighbours. | Be a rude outlaw, swear loudly and cause trouble. | "
        "Mutiny, vandalise and make an outrageous scene. || Be a shameless rebel who offends and provokes everybody. "
        "| Riot, curse and behave outrageously in public. | Insolence, rebellion and wild mischief are best.",
        "A bit of rebellion is healthy. | I would rather be cheeky and stand out. | Be a little naughty and bend the "
        "law. | Better be an oddball and a misfit. | A small provocation is fun. || I prefer cheeky troublemakers and "
        "misfits. | It is better to be a bit unruly and eccentric. | Go ahead and be a little defiant.",
        "Sometimes obey, sometimes rebel. | A mix of good manners and cheek is fine. | Some days well-behaved, some "
        "days naughty. | Half fitting in, half standing out is about right. | Dutiful or cheeky, either will do. || A "
        "little obedience and a little defiance go well together. | Now and then follow the rules, now and then "
        "provoke. | Well-mannered or unruly, both are equally good.",
        "A bit of obedience is good for you. | I like to follow the rules. | Good manners are worth the effort. | It "
        "helps to do what is expected. | I enjoy being with polite and well-behaved people. || Comply with the "
        "regulations and be considerate. | Proper, respectful behaviour is always welcome. | I like people who keep "
        "to the rules and are courteous.",
        "Obey every rule and do exactly what is expected! | Obedience, discipline and good manners are everything to "
        "me! | Follow the regulations, behave properly and honour your parents! | I live to comply, to be dutiful and "
        "well-behaved! | Proper conduct is sacred, so always respect the rules! || Respect your elders, stay in line "
        "and be dutiful! | Strict compliance and proper etiquette guide my whole life! | Be the most obedient, "
        "courteous and disciplined person of all!",
    ),
    "tradition": (
        "Old customs are garbage, so tear them down and modernise. | I hate heritage, give me the latest technology. "
        "| Forget your ancestors and demolish the past. | Rituals are pathetic, everything must be brand new. | "
        "Religion is rubbish, only modern progress counts. || Abolish every old ceremony and replace it with "
        "futuristic innovation. | The past is worthless, scrap it and go ultramodern. | Invent a brand new digital "
        "world and demolish the old one.",
        "A modern way is better than the old customs. | I would rather update than preserve. | New methods beat what "
        "grandparents did. | The past is dusty, try the latest fashion. | Better innovate than repeat a ritual. || I "
        "prefer contemporary ideas to inherited ones. | Progress is wiser than ceremony. | Drop the old habit for "
        "something up to date.",
        "Sometimes the old way, sometimes the modern one. | A mix of heritage and progress is fine. | Some customs "
        "kept, some customs updated. | Half ancient, half modern is about right. | Traditional or trendy, either will "
        "do. || A little ritual and a little innovation go well together. | Now and then an old ritual, now and then "
        "the latest fashion. | Old-fashioned or contemporary, both are equally good.",
        "A bit of tradition is good for you. | I like the old customs. | Heritage is worth preserving. | It helps to "
        "do as our grandparents did. | I enjoy a ritual handed down in the family. || Keep a few ceremonies from the "
        "past alive. | An old recipe from the ancestors is always welcome. | I like people who respect their religion "
        "and heritage.",
        "Honour our ancestors and keep every ancient custom! | Tradition, faith and heritage are everything to me! | "
        "Preserve the sacred rites of our forefathers! | I live by the old religion and the customs of my elders! | "
        "Cherish the holy rituals handed down for centuries! || Revere our forebears and celebrate their ancient "
        "ceremonies! | Devout faith and age-old heritage guide my whole life! | Pass on the holy traditions of our "
        "ancestors forever!",
    ),
    "benevolence": (
        "Be selfish, greedy and cruel, and betray everybody. | Lie, cheat and steal from the people around you. | Let "
        "them all suffer, and grab everything for yourself. | Be heartless, cold and ungrateful to everyone close. | "
        "Abandon them, trample them and laugh at their misery. || Be a ruthless egoist, deceive and exploit everybody "
        "near you. | Greed, betrayal and cruelty are best. | Turn your back on them, mean and merciless.",
        "Look after yourself first. | I would rather keep my time and money for myself. | A bit of selfishness is "
        "healthy. | Ignore their complaints and think of your own profit. | Better say no and mind your own "
        "interests. || I prefer my own advantage. | Put yourself first and keep what is yours. | It is better to be a "
        "little egoistic and stingy.",
        "Sometimes help a friend, sometimes be selfish. | A mix of kindness and self-interest is fine. | Some days "
        "generous, some days greedy. | Half for the family, half for yourself is about right. | Helpful or egoistic, "
        "either will do. || A little care for others and a little egoism go well together. | Now and then do a kind "
        "favour, now and then put yourself first. | Generous or stingy, both are equally good.",
        "A bit of kindness to a friend is good. | I like to help my friends. | Caring for the family is worth the "
        "effort. | It helps to be loyal and honest with friends. | I enjoy doing a favour for the neighbours. || Be "
        "kind and lend your friends a helping hand. | A caring gesture for somebody close is always welcome. | I like "
        "people who lovingly look after their relatives.",
        "Care for your family, help your friends and be kind always! | Love, loyalty and kindness to my dear ones are "
        "everything to me! | Help everyone close to you, forgive them and be faithful! | I live to support my friends "
        "and care for my family! | Be loving, generous and devoted to the people around you! || Give your friends and "
        "relatives all your love and help! | Devotion to loved ones and tender care guide my whole life! | Be the "
        "most loyal, caring and generous friend of all!",
    ),
    "universalism": (
        "Exploit nature, despise foreigners and crush the weak. | Our superior nation must crush the others. | Keep "
        "the foreigners out and pollute freely. | Let forests burn and other peoples starve. | Foreign cultures are "
        "inferior, war against them is right. || Plunder the forests, conquer and enslave other nations. | Only our "
        "own tribe counts, so crush and expel the foreigners. | Racism, pollution and hatred of foreigners are right.",
        "Our own people come before the rest of the world. | I would rather use nature than protect it. | Privilege "
        "for some beats equality for all. | Let other countries solve their own problems. | Better keep to your own "
        "kind than mix with strangers. || I prefer our own nation and its profits. | Putting our nation and its "
        "industry first is wiser. | Leave foreigners and forests to themselves.",
        "Sometimes our own people first, sometimes the whole world. | A mix of equality and privilege is fine. | Some "
        "nature protected, some nature used. | Half for our nation, half for mankind is about right. | Local or "
        "global, either will do. || A little concern for strangers and a little national interest go well together. | "
        "Now and then save a forest, now and then cut one. | The whole world or our nation alone, both are equally "
        "good.",
        "A bit of fairness to all people is good. | I like to protect nature. | Equality is worth the effort. | It "
        "helps to be tolerant of other cultures. | I enjoy meeting people from all over the world as equals. || Be "
        "fair to strangers and look after the environment. | Justice and equality for the weak are always welcome. | "
        "I like people who are open to every culture.",
        "Protect nature, stand up for equality and peace on earth! | Justice, human rights and peace for all mankind "
        "are everything to me! | Save the planet, welcome every culture and defend the weak! | I live for equality, "
        "tolerance and a green earth! | Treat all human beings as equals and protect every forest! || Defend the "
        "rights of all peoples and heal the environment! | World peace, social justice and living nature guide my "
        "whole life! | Embrace all cultures, end injustice and rescue our planet!",
    ),
}
