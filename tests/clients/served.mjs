// The server that clients are checked against, and a few of its answers at temperature 0: the values of served.py.
export const baseURL = `${process.env.SERVER_URL}/v1`;
export const apiKey = process.env.SERVER_KEY;
export const model = "stories260k";

export const prompt = "Once upon a time";
export const promptIds = [1, 403, 407, 261, 378];
export const completion = ", there was a little girl named Lily. She"; // 12 tokens

export const messages = [{ role: "user", content: "Hello" }];
export const answer = '"Here," said his mom.\nT'; // 12 tokens
export const upToSaid = '"Here,"'; // the answer with the stop string " said"
export const chatTokens = 43; // tokens of the rendered messages
