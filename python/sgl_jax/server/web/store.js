// Conversations, kept in the browser. Each is a tree of turns: an edit or another answer is a sibling.
const HOME = `sgl_jax:${location.pathname}:`; // several servers may share an address, by path
const FORMAT = "sgl_jax-chats-1";

const id = () => Math.random().toString(36).slice(2, 12);

export function read(name, otherwise) {
  try { return JSON.parse(localStorage.getItem(HOME + name)) ?? otherwise; } catch { return otherwise; }
}

export const write = (name, value) => localStorage.setItem(HOME + name, JSON.stringify(value));

// Returns all conversations, the last used first.
export function readAll() {
  const names = Object.keys(localStorage).filter((name) => name.startsWith(`${HOME}chat:`));
  const found = names.map((name) => read(name.slice(HOME.length))).filter(isConversation);
  return found.sort((a, b) => b.used - a.used);
}

export const newConversation = (system = "") => ({ id: id(), title: "", used: Date.now(), system, turns: {}, chosen: {} });

// Writes a conversation. Where the browser's store is full its probabilities go first. Says whether there was room.
export function save(conversation) {
  const lean = (name, value) => (name === "tokens" ? undefined : value);
  for (const keep of [undefined, lean]) {
    try {
      localStorage.setItem(`${HOME}chat:${conversation.id}`, JSON.stringify(conversation, keep));
      return true;
    } catch { /* the store is full */ }
  }
  return false;
}

export const remove = (conversation) => localStorage.removeItem(`${HOME}chat:${conversation.id}`);

// --- the tree: a turn without a parent hangs on "root"

export const siblings = (conversation, turn) => children(conversation, turn.parent);

const children = (conversation, parent) => Object.values(conversation.turns).filter((turn) => turn.parent === parent);

// Returns the turns that are shown: at each the child that was chosen last.
export function path(conversation) {
  const found = [];
  for (let at = "root"; (at = conversation.chosen[at]) && conversation.turns[at]; ) found.push(conversation.turns[at]);
  return found;
}

export const before = (conversation, turn) => {
  const found = [];
  for (let at = conversation.turns[turn.parent]; at; at = conversation.turns[at.parent]) found.unshift(at);
  return found;
};

export function add(conversation, parent, turn) {
  const added = { id: id(), parent, content: "", ...turn };
  conversation.turns[added.id] = added;
  conversation.chosen[parent] = added.id;
  if (!conversation.title) conversation.title = added.content.trim().split("\n")[0].slice(0, 60);
  conversation.used = Date.now();
  return added;
}

export const choose = (conversation, turn) => { conversation.chosen[turn.parent] = turn.id; };

// --- files

export const exported = (conversations) => JSON.stringify({ format: FORMAT, conversations }, null, 1);

// Returns the conversations of a file. Throws what is wrong with it.
export function imported(text) {
  let found;
  try { found = JSON.parse(text); } catch { throw new Error("The file is not JSON."); }
  if (found?.format !== FORMAT || !Array.isArray(found.conversations)) throw new Error(`The file is not of the format ${FORMAT}.`);
  if (!found.conversations.every(isConversation)) throw new Error("A conversation of the file is damaged.");
  return found.conversations;
}

const isText = (value) => typeof value === "string";
const isPlain = (value) => typeof value === "object" && value !== null && !Array.isArray(value);

const isListOf = (value, check) => value === undefined || (Array.isArray(value) && value.every((each) => isPlain(each) && check(each)));

const isConversation = (value) =>
  isPlain(value) && [value.id, value.title, value.system].every(isText) && Number.isFinite(value.used) &&
  isPlain(value.turns) && isPlain(value.chosen) && Object.entries(value.turns).every(isTurn);

const isTurn = ([name, turn]) =>
  isPlain(turn) && turn.id === name && isText(turn.parent) && isText(turn.content) &&
  ["user", "assistant", "tool"].includes(turn.role) && (turn.thought === undefined || isText(turn.thought)) &&
  (turn.error === undefined || isText(turn.error)) && isListOf(turn.tokens, (token) => isText(token.text) && Array.isArray(token.top) && token.top.every(Array.isArray)) &&
  isListOf(turn.calls, (call) => [call.id, call.name, call.args].every(isText)) && (turn.stats === undefined || (isPlain(turn.stats) && Object.values(turn.stats).every(Number.isFinite)));
