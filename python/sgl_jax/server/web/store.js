// Conversations, kept in the browser. Each is a tree of turns: an edit or another answer is a sibling.
const HOME = `sgl_jax:${location.pathname}:`; // servers may share an address, with a path for each
const FORMAT = "sgl_jax-chats-1";

const newId = () => Math.random().toString(36).slice(2, 12);

export function read(name, otherwise) {
  try { return JSON.parse(localStorage.getItem(HOME + name)) ?? otherwise; } catch { return otherwise; }
}

export const write = (name, value) => localStorage.setItem(HOME + name, JSON.stringify(value));

// Returns all conversations, the last used first.
export const readAll = () => Object.keys(localStorage)
  .filter((name) => name.startsWith(`${HOME}chat:`))
  .map((name) => read(name.slice(HOME.length)))
  .filter(isConversation)
  .sort((a, b) => b.used - a.used);

export const newConversation = (system = "") => ({ id: newId(), title: "", used: Date.now(), system, turns: {}, chosen: {} });

// Writes a conversation; where the browser's store is full, without its probabilities. Says whether there was room.
export function save(conversation) {
  for (const lean of [null, (name, value) => (name === "tokens" ? undefined : value)]) {
    try {
      localStorage.setItem(`${HOME}chat:${conversation.id}`, JSON.stringify(conversation, lean));
      return true;
    } catch { /* full */ }
  }
  return false;
}

export const remove = ({ id }) => localStorage.removeItem(`${HOME}chat:${id}`);

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
  const found = JSON.parse(text);
  if (found?.format !== FORMAT || !Array.isArray(found.conversations)) throw new Error(`The file is not of the format ${FORMAT}.`);
  if (!found.conversations.every(isConversation)) throw new Error("A conversation of the file is damaged.");
  return found.conversations;
}

const areTexts = (...values) => values.every((value) => typeof value === "string");
const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const isList = (value, check) => Array.isArray(value) && value.every((each) => isObject(each) && check(each));

function isConversation(value) {
  return isObject(value) && areTexts(value.id, value.title, value.system) && Number.isFinite(value.used) &&
    isObject(value.chosen) && isObject(value.turns) && Object.entries(value.turns).every(([id, turn]) => isTurn(turn) && turn.id === id);
}

function isTurn(turn) {
  const { role, parent, content, thought = "", error = "", head = "", finish = "", tokens = [], calls = [], stats } = turn ?? {};
  return ["user", "assistant", "tool"].includes(role) && areTexts(parent, content, thought, error, head, finish) &&
    isList(tokens, ({ text, top }) => areTexts(text) && Array.isArray(top) && top.every((other) => areTexts(other?.[0]))) &&
    isList(calls, ({ id, name, args }) => areTexts(id, name, args)) &&
    (stats === undefined || ["prompt", "cached", "made", "ttft", "rate"].every((name) => Number.isFinite(stats?.[name])));
}
