// Conversations, kept in the browser. Each is a tree of turns: an edit or another answer is a sibling.
import { keep, kept, names, parsed } from "./kept.js";

const FORMAT = "sgl_jax-chats-1";

const newId = () => Math.random().toString(36).slice(2, 12);

const read = (name) => parsed(kept(name));

// Returns all conversations, the last used first.
export const readAll = () => names()
  .filter((name) => name.startsWith("chat:"))
  .map(read)
  .filter(isConversation)
  .sort((a, b) => b.used - a.used);

export const newConversation = (system = "") => ({ id: newId(), title: "", used: Date.now(), system, turns: {}, chosen: {} });

// Takes in what another tab has written meanwhile: turns, and ends of turns that have none here.
function merge(conversation) {
  const other = read(`chat:${conversation.id}`);
  if (!isConversation(other)) return;
  const { turns } = conversation, hasEnd = (turn) => turn.finish || turn.error;
  for (const turn of Object.values(other.turns)) if (!turns[turn.id] || (hasEnd(turn) && !hasEnd(turns[turn.id]))) turns[turn.id] = turn;
  conversation.chosen = { ...other.chosen, ...conversation.chosen };
}

// Writes a conversation; where the browser's store is full, without its probabilities. Says whether there was room.
export function save(conversation) {
  merge(conversation);
  const write = (lean) => keep(`chat:${conversation.id}`, JSON.stringify(conversation, lean));
  return write(null) || write((name, value) => (name === "tokens" ? undefined : value));
}

// Removes a turn, unless others hang from it.
export function discard(conversation, { id }) {
  merge(conversation);
  if (Object.values(conversation.turns).some(({ parent }) => parent === id)) return;
  delete conversation.turns[id];
  remove(conversation); // else the next merge brings it back
}

export const remove = ({ id }) => keep(`chat:${id}`, null);

// --- the tree, whose first turns have the parent "root"

export const siblings = ({ turns }, { parent }) => Object.values(turns).filter((turn) => turn.parent === parent);

// Returns the turns that are shown: of each the child that was chosen last.
export function path({ turns, chosen }) {
  const found = [];
  for (let at = "root", turn; (turn = turns[chosen[at]])?.parent === at; at = turn.id) found.push(turn);
  return found;
}

export function before({ turns }, { parent }) {
  const found = [];
  for (let at = turns[parent]; at; at = turns[at.parent]) found.unshift(at);
  return found;
}

export const choose = ({ chosen }, { id, parent }) => { chosen[parent] = id; };

export function add(conversation, parent, turn) {
  const added = { id: newId(), parent, ...turn };
  conversation.turns[added.id] = added;
  choose(conversation, added);
  conversation.title ||= added.content.trim().split("\n")[0].slice(0, 60);
  conversation.used = Date.now();
  return added;
}

// --- files

export const exported = (conversations) => JSON.stringify({ format: FORMAT, conversations }, null, 1);

// Returns the conversations of a file. Throws what is wrong with it.
export function imported(text) {
  const found = parsed(text);
  if (found?.format !== FORMAT || !Array.isArray(found.conversations)) throw new Error(`The file is not of the format ${FORMAT}.`);
  if (!found.conversations.every(isConversation)) throw new Error("A conversation of the file is damaged.");
  return found.conversations;
}

const areTexts = (...values) => values.every((value) => typeof value === "string");
const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const isList = (value, check) => Array.isArray(value) && value.every((each) => isObject(each) && check(each));

function isConversation(value) {
  return isObject(value) && areTexts(value.id, value.title, value.system) && Number.isFinite(value.used) &&
    isObject(value.chosen) && isObject(value.turns) && !value.turns.root && Object.entries(value.turns).every(([id, turn]) => isTurn(turn) && turn.id === id);
}

// Drops figures that are damaged. Parents in a circle do no harm: no way leads there from "root".
function isTurn(turn) {
  if (turn?.stats && !"prompt cached made ttft rate".split(" ").every((name) => Number.isFinite(turn.stats[name]))) delete turn.stats;
  const { role, parent, content, thought = "", error = "", head = "", finish = "", tokens = [], calls = [] } = turn ?? {};
  return ["user", "assistant", "tool"].includes(role) && areTexts(parent, content, thought, error, head, finish) &&
    isList(tokens, ({ text, top }) => areTexts(text) && Array.isArray(top) && top.every((other) => areTexts(other?.[0]))) &&
    isList(calls, ({ id, name, args }) => areTexts(id, name, args));
}
